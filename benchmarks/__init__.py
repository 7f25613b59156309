"""Benchmarks: `python -m benchmarks.layer --help`. Every number is a ratio of arms timed in turn in one run."""
