"""ONNX Runtime GenAI: one static batch, which is all it has on a CPU. ``run_genai.py FOLDER``."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime_genai as og
from loop import serve


class Static:
    """Holds the model; each batch is a generator of its own."""

    def __init__(self, folder: str) -> None:
        self._model = og.Model(folder)

    def answer(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Decode greedily; prompts have one length, and no token ends a text."""
        params, length = og.GeneratorParams(self._model), len(prompts[0])
        params.set_search_options(
            batch_size=len(prompts),
            max_length=length + new_tokens,
            min_length=length + new_tokens,
            do_sample=False,
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        rows = range(len(prompts))
        return [[int(token) for token in generator.get_sequence(row)[length:]] for row in rows]


serve(Static(sys.argv[1]).answer)
