"""Finds the fewest forwards to the serial result, beside the modes.

- ``oracle``  fewest denoising forwards of one block
- ``measure`` all ways to decode over prompts, in tokens per forward
"""
