"""Generated from ``proto/sidecar/v1``: the contract, importable without the rest (``make proto`` writes it)."""
