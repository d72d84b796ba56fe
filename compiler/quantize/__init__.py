"""Weights in 8 or 4 bits: the arithmetic, the scales it needs, and the graph around it."""
