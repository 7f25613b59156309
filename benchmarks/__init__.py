"""Benchmarks: `python -m benchmarks --help`. Every number is a ratio of arms timed in turn in one run."""
