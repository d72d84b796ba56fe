"""The arithmetic of quantized weights, and the scales of a layer."""
