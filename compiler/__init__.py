"""Compiles a checkpoint to a bundle.

Stages, passes, the weight pack and engines. Nothing heavy is imported here.
"""
