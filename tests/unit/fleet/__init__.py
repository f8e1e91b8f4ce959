"""The parts of a fleet, each without a network."""
