"""The demo checkpoint: a few million parameters in the public layout, trained on short tasks whose
answers can be checked exactly.
"""
