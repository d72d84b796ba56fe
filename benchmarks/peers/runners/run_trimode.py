"""Runs a trimode bundle: one row by ``ar``, more by ``verify``, as decoding does."""

from __future__ import annotations

from typing import Any

import numpy as np
from measure import main


class Bundle:
    """A text in a session's cache."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        from trimode.runtime import TriModeModel

        model = TriModeModel.from_pretrained(
            wanted["model"], num_threads=wanted["threads"], verify=False
        )
        self._session = model.session
        self._cache = self._session.new_cache()
        self._length = 0

    def read(self, ids: list[int]) -> None:
        """Begin the text anew."""
        self._session.run("ar", self._cache, np.array([ids]), 0)
        self._length = len(ids)

    def forward(self, ids: list[int]) -> None:
        """Read further tokens."""
        graph = "ar" if len(ids) == 1 else "verify"
        self._session.run(graph, self._cache, np.array([ids]), self._length)

    def back(self) -> None:
        """Nothing: what lies behind the text does not count."""


main(Bundle)
