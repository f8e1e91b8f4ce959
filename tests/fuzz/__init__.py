"""Hostile requests for every RPC, and payloads for SGLang's own unpickler. See docs/fuzzing.md."""
