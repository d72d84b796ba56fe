"""bundle -> tokens: sessions, the K/V cache, one function per decoding algorithm.

Imports neither torch nor onnx nor transformers.
"""

from trimode.runtime.decode.stream import Chunk, Generation
from trimode.runtime.engine.batch import Batch, BatchRow
from trimode.runtime.model import TriModeModel

__all__ = ["Batch", "BatchRow", "Chunk", "Generation", "TriModeModel"]
