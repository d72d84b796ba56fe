"""Builds TensorRT engines, in processes, for shape profiles."""
