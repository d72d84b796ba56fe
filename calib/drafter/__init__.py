"""Trains a checkpoint's drafter on answers that the model writes as it will be served.

- ``settings``: what a caller can choose
- ``answers``: prompts answered, and made into batches
- ``adapter``: the adapter on the trunk
- ``training``: the training itself
- ``measure``: how well an adapter drafts
- ``job``: all of it, from beginning to end
"""
