"""Benchmarks: each asserts agreement first, then times interleaved arms. `python -m bench --help`."""
