"""The learned sampler of block diffusion: its network, and tracing."""
