"""The only code that knows SGLang's HTTP: its routes by release, its answers, and how it is watched."""
