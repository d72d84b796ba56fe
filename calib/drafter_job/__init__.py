"""Trains a checkpoint's drafter against the model as it will be served, which writes the answers itself.

- ``settings``: what a caller can choose
- ``answers``: prompts answered, and made into batches
- ``measure``: how well an adapter drafts
- ``record``: what is written beside the adapter
- ``job``: all of it, from beginning to end
"""
