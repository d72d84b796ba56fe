"""Trains a checkpoint's drafter against the model as it will be served, which writes the answers itself.

- ``settings``: what a caller can choose
- ``answers``: prompts split, answered, and made into batches
- ``served``: the trunk with the weights of a bundle
- ``measure``: how well an adapter drafts
- ``state``: what an interrupted run leaves behind
- ``record``: what is written beside the adapter
- ``job``: all of it, from beginning to end
"""
