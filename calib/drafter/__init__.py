"""Trains a checkpoint's drafter against the model as it will be served, which writes the answers
itself.

- ``settings``: what a caller can choose
- ``answers``: prompts answered, and made into batches
- ``adapter``: the adapter on the trunk
- ``training``: the training itself
- ``measure``: how well an adapter drafts
- ``job``: all of it, from beginning to end
"""
