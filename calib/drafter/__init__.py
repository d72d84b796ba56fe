"""Trains a checkpoint's drafter on answers that the model writes.

- ``settings``: choices of a caller
- ``answers``: prompts answered by the model, in batches
- ``adapter``: the adapter, apart from a trunk
- ``windows``: windows of answers, drafted and verified, and their loss
- ``training``: the training itself
- ``measure``: tokens that an adapter gets accepted
- ``job``: all steps in order
"""
