"""The benchmarks' own parts: shapes, samples, tables, targets, counters."""
