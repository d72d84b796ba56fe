"""What quantization costs: measured against the checkpoint in float32, and kept within a budget.

- ``fidelity``    how far tensors and probabilities are from the original's, in streaming sums
- ``candidate``   a way to quantize a checkpoint, the trunk quantized that way, and the bytes it
  takes
- ``lockstep``    the original and a quantized trunk run the same forwards side by side
- ``questions``   prompts, answers where they are known, and what a caller can choose
- ``decoding``    every mode's answers and how they compare
- ``job``         all of it in order: ``trimode report quantization``
- ``sensitivity`` which layers to keep in high precision: ``trimode calibrate sensitivity``
"""
