"""Benchmarks and measurements: ``python -m masksl.bench``."""
