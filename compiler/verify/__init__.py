"""Compares a bundle with its checkpoint.

The reference is the torch trunk, run eagerly in float32.

- ``run``        all of it in order: ``trimode verify``
- ``reference``  the trunk that the bundle is compared with
- ``notes``      what was left out
- ``tolerance``  what may differ, by the type a target computes in
- ``runners``    Polygraphy runners for a session and for the trunk
- ``graphs``     each graph at several positions and numbers of rows
- ``outputs``    what two runners return for the same inputs
- ``tokens``     each mode's tokens
- ``weights``    quantized weights and their scales, bit for bit
- ``sampler``    the learned sampler's scores
- ``rounding``   inputs that lie on a border between two codes
"""
