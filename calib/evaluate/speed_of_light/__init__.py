"""Finds the fewest forwards that give the serial result, beside what the modes reach.

- ``oracle``  the fewest denoising forwards of one block
- ``measure`` all ways to decode, over prompts, in tokens per forward
"""
