"""Writes an OpenVINO model of a checkpoint: ``make_paged.py CHECKPOINT FOLDER``.

It is in float32. Its inputs, states and attention have the forms that OpenVINO GenAI turns into
paged attention, as those of optimum-intel's export do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

sys.path.append(str(Path(__file__).parents[1] / "peers" / "runners"))
from make_openvino import Writer


class PagedWriter(Writer):
    """Writes the graph for several sequences."""

    def model(self) -> ov.Model:
        """Ids, mask and positions to the logits of every row."""
        ids = op.parameter([-1, -1], np.int64, name="input_ids")
        mask = op.parameter([-1, -1], np.int64, name="attention_mask")
        positions = op.parameter([-1, -1], np.int64, name="position_ids")
        beams = op.parameter([-1], np.int32, name="beam_idx")
        inputs = [ids, mask, positions, beams]
        for one in inputs:
            one.output(0).set_names({one.get_friendly_name()})
        self.beams, rows = beams, op.gather(op.shape_of(ids), np.int64(0), np.int64(0))
        self.rows = op.unsqueeze(rows, np.int64(0))
        self.mask = self._visible(mask, positions)
        return self.layers(ids, positions, inputs)

    def _visible(self, mask: Any, positions: Any) -> Any:
        """What each row may look at, ``(B, 1, L, T)``."""
        length = op.gather(op.shape_of(mask), np.int64(1), np.int64(0))
        keys = op.range(np.int64(0), length, np.int64(1), "i64")
        seen = op.less_equal(op.unsqueeze(keys, np.array([0, 1])), op.unsqueeze(positions, 2))
        return op.unsqueeze(op.select(seen, np.float32(0), np.float32(-np.inf)), np.int64(1))

    def state_name(self, kind: str, index: int) -> str:
        return f"past_key_values.{index}.{kind}present.{index}.{kind}"

    def empty_cache(self, groups: int, size: int) -> Any:
        shape = op.concat([self.rows, op.constant(np.array([groups, 0, size]))], 0)
        return op.broadcast(np.float32(0), shape)


def main(folder: Path, output: Path) -> None:
    """Write the model."""
    output.mkdir(parents=True, exist_ok=True)
    model = PagedWriter(folder, "f32").model()
    ov.save_model(model, output / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
