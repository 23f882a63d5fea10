"""Measurements of speed, each a program: `python -m linearize.benchmarks.NAME --out FILE`; results in `benchmarks/`."""
