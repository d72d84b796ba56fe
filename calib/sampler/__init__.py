"""Trains a sampler for block diffusion on the states that the decoder passes through.

- ``settings``: what a caller can choose
- ``trajectories``: denoised blocks, state by state, beside the tokens that serial denoising ends
  with
- ``training``: a network on these states
- ``scorer``: the network where the runtime asks for scores
- ``measure``: what it is worth
- ``job``: all of it, from beginning to end
"""
