"""Tests of `sidecar.doctor`, on planted hosts."""
