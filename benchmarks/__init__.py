"""Measurements behind every claim of speed; run one with python -m benchmarks.NAME."""
