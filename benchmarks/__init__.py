"""Measurements of speed, each a program: `python -m benchmarks.NAME --out FILE`; results in `benchmarks/`."""
