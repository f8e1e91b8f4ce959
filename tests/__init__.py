"""Tests, by how much of the real thing takes part."""
