"""Weight sources, on real process groups."""
