"""What the model computes: configuration, checkpoint, trunk, roles, tensor contract, tracing.

Nothing is imported here: the runtime reads ``trimode.graphs.contract`` and must not load torch.
"""
