"""Reads the execution plan inside a TensorRT-RTX engine.

It says what a forward moves through the GPU's memory. No GPU is needed.
"""
