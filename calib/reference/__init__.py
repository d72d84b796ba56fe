"""The model in PyTorch: eagerly, from mapped files, and with weights rounded as a bundle has
them.
"""
