"""bundle -> tokens: sessions, the K/V cache, one function per decoding algorithm.

Imports neither torch nor onnx nor transformers.
"""

from trimode.runtime.model import Chunk, Generation, TriModeModel

__all__ = ["Chunk", "Generation", "TriModeModel"]
