"""trimode: a deployment compiler for tri-mode language models.

One checkpoint decodes in three ways with the same weights: autoregressive, block diffusion and self-speculation.

- ``trimode.graphs``: what the model computes
- ``trimode.calib``: jobs that need data
- ``trimode.compiler``: checkpoint -> bundle
- ``trimode.runtime``: bundle -> tokens
"""

__version__ = "0.1.0"
