"""What deploy/ promises: it parses, it fits this sidecar's flags and metrics, and it is as closed as it says."""
