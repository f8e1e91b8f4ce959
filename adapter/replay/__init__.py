"""Inside SGLang's scheduler processes: what ``adapter.loader`` records, proves and replays.

Knows torch and the standard library alone: the environment of the engine has neither gRPC nor this package's other
parts to offer.
"""
