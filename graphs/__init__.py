"""Describes what the model computes: configuration, checkpoint, network, numbers.

Nothing is imported here.
"""
