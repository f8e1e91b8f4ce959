"""The fault matrix: who fails, how, and in which phase of an update; what is seen then, and what heals it."""
