"""Trains the demo checkpoint: a few million parameters in the public layout.

Its tasks are short, and their answers can be checked exactly.
"""
