"""A real sidecar process beside a scripted engine."""
