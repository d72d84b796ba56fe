"""The execution plan inside a TensorRT-RTX engine: what a forward moves through the GPU's memory,
read without a GPU.
"""
