"""Bottlenecks made narrower: which channels stay, and the weights that follow."""
