"""Real SGLang servers on the CPU."""
