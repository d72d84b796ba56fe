"""Decodes: each mode's algorithm, its options, and the choice of tokens."""
