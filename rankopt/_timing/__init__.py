"""Measured time: of callables side by side, of layers, and where it is remembered."""
