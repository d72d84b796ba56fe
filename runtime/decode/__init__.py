"""Decoding: the algorithm of each mode, its options, and how tokens are chosen."""
