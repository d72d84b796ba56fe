"""Parity of a bundle with its checkpoint: graphs and tokens of a target against the torch trunk, run eagerly in float32.

- ``tolerance``     what may differ, by the type a target computes in
- ``runners``       Polygraphy runners for a session and for the trunk
- ``graph_parity``  each graph at several positions and numbers of rows
- ``token_parity``  each mode's tokens
- ``report``        the records of ``verification.json``
"""
