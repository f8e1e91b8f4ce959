"""Three real engines, each in a network of its own, as one fleet: `make fleet`."""
