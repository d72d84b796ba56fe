"""Defines the learned sampler of block diffusion, and its tracing."""
