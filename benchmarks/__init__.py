"""What a weight sync costs, against its peers and against a bare copy: ``python -m benchmarks --help``.

See docs/benchmarks.md. Nothing here is installed with the package; it runs from a checkout.
"""
