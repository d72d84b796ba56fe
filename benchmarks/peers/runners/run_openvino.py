"""Runs an OpenVINO model whose caches are states."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from measure import main


class Stateful:
    """A text in an infer request."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        core = ov.Core()
        config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": wanted["threads"],
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if wanted.get("kv") == "f32":
            config["KV_CACHE_PRECISION"] = "f32"
        compiled = core.compile_model(f"{wanted['model']}/model.xml", "CPU", config)
        self._request = compiled.create_infer_request()
        self._length = self._end = 0
        self._kept: list[tuple[Any, Any]] = []

    def read(self, ids: list[int]) -> None:
        """Begin the text anew."""
        self._request.reset_state()
        self._end = 0
        self.forward(ids)
        self._length = len(ids)

    def forward(self, ids: list[int]) -> None:
        """Read further tokens."""
        rows, end = len(ids), self._end + len(ids)
        seen = np.arange(end)[None] <= np.arange(self._end, end)[:, None]
        mask = np.where(seen, np.float32(0), np.float32(-np.inf))
        self._request.infer(
            {
                "input_ids": np.array([ids]),
                "position_ids": np.arange(self._end, end)[None],
                "mask": mask.reshape(1, 1, rows, end),
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self._end = end

    def back(self) -> None:
        """Nothing: the text goes on behind, a few hundred tokens in all."""


main(Stateful)
