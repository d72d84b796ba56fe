"""Runs a model folder of onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
from measure import main


class Genai:
    """A text in a generator."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        path = Path(wanted["model"]) / "genai_config.json"
        config = json.loads(path.read_text())
        options = config["model"]["decoder"]["session_options"]
        options["intra_op_num_threads"] = wanted["threads"]
        path.write_text(json.dumps(config))
        self._model = og.Model(wanted["model"])
        self._length = 0

    def read(self, ids: list[int]) -> None:
        """Begin the text anew."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + 128, do_sample=False)
        self._generator = og.Generator(self._model, params)
        self._generator.append_tokens(ids)
        self._length = len(ids)

    def forward(self, ids: list[int]) -> None:
        """Read further tokens."""
        self._generator.append_tokens(ids)

    def back(self) -> None:
        """Shorten the text to what was read first."""
        self._generator.rewind_to(self._length)


main(Genai)
