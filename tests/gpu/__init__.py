"""Tests that need real GPUs; run by `make test-gpu` on such a machine, not by `make test`."""
