"""`python -m adapter.demo`: weights of two trainer processes reach a real SGLang server, shown to a person."""
