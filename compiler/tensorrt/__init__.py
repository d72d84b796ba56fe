"""TensorRT: engines, the processes that build them, and shape profiles."""
