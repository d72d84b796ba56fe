"""Checks what a caller asks of a model, and fills in what the bundle knows."""
