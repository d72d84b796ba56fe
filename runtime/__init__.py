"""bundle -> tokens: sessions, the K/V cache, one function per decoding algorithm.

Imports neither torch nor onnx nor transformers.
"""

from trimode.runtime.batch import Batch, BatchRow
from trimode.runtime.model import TriModeModel
from trimode.runtime.stream import Chunk, Generation

__all__ = ["Batch", "BatchRow", "Chunk", "Generation", "TriModeModel"]
