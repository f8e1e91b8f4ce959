"""``sglang-weight-sync doctor``: whether weight sync will work here, before the first crash.

Owns the looks at the engine, at its process and at this host, and what they mean for an update. It is run where the
trainer runs: as its user, in its container, with its environment. Invariant: nothing is changed in the engine, every
wait is bounded, no key is ever printed, and what cannot be seen is said to be so rather than taken to be well.
"""
