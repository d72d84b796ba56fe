"""Trains a sampler on the states that block diffusion passes through.

- ``settings``: choices of a caller
- ``trajectories``: denoised blocks, state by state, beside the tokens of serial denoising
- ``training``: a network on these states
- ``scorer``: the network where the runtime asks for scores
- ``measure``: quality of the scores, and of texts
- ``job``: all steps in order
"""
