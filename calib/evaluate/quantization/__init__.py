"""Measures the cost of quantization, and keeps it within a budget.

- ``fidelity``    distance of tensors and probabilities from the original's, in streaming sums
- ``candidate``   a way to quantize a checkpoint, a trunk quantized that way, and its bytes
- ``lockstep``    the original and a quantized trunk side by side
- ``questions``   prompts with known answers, and choices of a caller
- ``decoding``    answers in every mode, compared
- ``job``         the steps of ``trimode report quantization``
- ``sensitivity`` the layers to keep in high precision: ``trimode calibrate sensitivity``
"""
