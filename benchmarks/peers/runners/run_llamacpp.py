"""Runs a GGUF file with llama.cpp, by its C interface."""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as lib
from measure import main


class Llama:
    """A text in a context."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            wanted["model"].encode(), lib.llama_model_default_params()
        )
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = wanted["past"] + 128, 512, 512
        params.n_threads = params.n_threads_batch = wanted["threads"]
        if wanted.get("kv") == "f32":
            params.type_k = params.type_v = 0  # GGML_TYPE_F32
        self._context = lib.llama_init_from_model(self._model, params)
        self._batch = lib.llama_batch_init(512, 0, 1)
        self._length = 0

    def read(self, ids: list[int]) -> None:
        """Begin the text anew."""
        self._forget(0)
        self._length = 0
        self._decode(ids, every=False)
        self._length = len(ids)

    def forward(self, ids: list[int]) -> None:
        """Read further tokens, with the logits of each, as a verification needs them."""
        self._decode(ids, every=True)

    def back(self) -> None:
        """Shorten the text to what was read first."""
        self._forget(self._length)

    def _forget(self, length: int) -> None:
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, length, -1)

    def _decode(self, ids: list[int], *, every: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, one in enumerate(ids):
            batch.token[index], batch.pos[index] = one, self._length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = int(every or index == len(ids) - 1)
        if lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        lib.llama_get_logits(self._context)  # waits


main(Llama)
