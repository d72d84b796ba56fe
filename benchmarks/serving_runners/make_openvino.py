"""Writes an OpenVINO model of a checkpoint: ``make_openvino.py CHECKPOINT FOLDER``.

It is in float32. Its inputs, states and attention have the forms that OpenVINO GenAI turns into
paged attention, as those of optimum-intel's export do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a safetensors file of bfloat16, as float32."""
    data = np.memmap(path, np.uint8, "r")
    end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:end].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        halves = data[end + begin : end + stop].view(np.uint16)
        wide = (halves.astype(np.uint32) << 16).view(np.float32)
        yield name, wide.reshape(entry["shape"])


class Writer:
    """Adds the layers of a checkpoint to a graph."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = dict(tensors(folder / "model.safetensors"))
        self.sinks: list[Any] = []
        self.variables: list[Any] = []

    def model(self) -> ov.Model:
        """Ids, mask and positions to the logits of every row."""
        ids = op.parameter([-1, -1], np.int64, name="input_ids")
        mask = op.parameter([-1, -1], np.int64, name="attention_mask")
        positions = op.parameter([-1, -1], np.int64, name="position_ids")
        beams = op.parameter([-1], np.int32, name="beam_idx")
        for one in (ids, mask, positions, beams):
            one.output(0).set_names({one.get_friendly_name()})
        self.beams, self.rows = beams, op.gather(op.shape_of(ids), np.int64(0), np.int64(0))
        self.rows = op.unsqueeze(self.rows, np.int64(0))
        self.mask = self._visible(mask, positions)
        self.cos, self.sin = self._angles(positions)
        x = op.gather(op.constant(self.weights["model.embed_tokens.weight"]), ids, np.int64(0))
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.", layer)
        x = self._norm(x, "model.norm.weight")
        logits = op.result(self._product(x, "lm_head.weight"), name="logits")
        logits.output(0).set_names({"logits"})
        found = ov.Model([logits], self.sinks, [ids, mask, positions, beams], "llama")
        found.add_variables(self.variables)
        return found

    def _visible(self, mask: Any, positions: Any) -> Any:
        """What each row may look at, ``(B, 1, L, T)``."""
        length = op.gather(op.shape_of(mask), np.int64(1), np.int64(0))
        keys = op.range(np.int64(0), length, np.int64(1), "i64")
        seen = op.less_equal(op.unsqueeze(keys, np.array([0, 1])), op.unsqueeze(positions, 2))
        return op.unsqueeze(op.select(seen, np.float32(0), np.float32(-np.inf)), np.int64(1))

    def _layer(self, x: Any, prefix: str, index: int) -> Any:
        y = self._norm(x, f"{prefix}input_layernorm.weight")
        x = op.add(x, self._attention(y, f"{prefix}self_attn.", index))
        y = self._norm(x, f"{prefix}post_attention_layernorm.weight")
        gate = op.swish(self._product(y, f"{prefix}mlp.gate_proj.weight"))
        both = op.multiply(gate, self._product(y, f"{prefix}mlp.up_proj.weight"))
        return op.add(x, self._product(both, f"{prefix}mlp.down_proj.weight"))

    def _norm(self, x: Any, name: str) -> Any:
        mean = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        root = op.sqrt(op.add(mean, np.float32(self.config["rms_norm_eps"])))
        scale = op.constant(self.weights[name].reshape(1, 1, -1))
        return op.multiply(scale, op.multiply(x, op.divide(np.float32(1), root)))

    def _product(self, x: Any, name: str) -> Any:
        weight = op.constant(self.weights[name])
        return op.matmul(x, weight, transpose_a=False, transpose_b=True)

    def _heads(self, x: Any, count: int) -> Any:
        shape = np.array([0, 0, count, self.config["head_dim"]])
        return op.transpose(op.reshape(x, shape, special_zero=True), np.array([0, 2, 1, 3]))

    def _attention(self, x: Any, prefix: str, index: int) -> Any:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query = self._rotated(self._heads(self._product(x, f"{prefix}q_proj.weight"), heads))
        key = self._rotated(self._heads(self._product(x, f"{prefix}k_proj.weight"), groups))
        value = self._heads(self._product(x, f"{prefix}v_proj.weight"), groups)
        key = self._cached(key, f"past_key_values.{index}.keypresent.{index}.key")
        value = self._cached(value, f"past_key_values.{index}.valuepresent.{index}.value")
        factors = [self._repeated(one, heads // groups) for one in (key, value)]
        read = op.scaled_dot_product_attention(query, *factors, self.mask)
        size = np.array([0, 0, heads * self.config["head_dim"]])
        rows = op.reshape(op.transpose(read, np.array([0, 2, 1, 3])), size, special_zero=True)
        return self._product(rows, f"{prefix}o_proj.weight")

    def _cached(self, new: Any, name: str) -> Any:
        groups, size = self.config["num_key_value_heads"], self.config["head_dim"]
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, groups, -1, size])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        shape = op.concat([self.rows, op.constant(np.array([groups, 0, size]))], 0)
        past = ov.opset6.read_value(op.broadcast(np.float32(0), shape), variable)
        past = op.gather(past, self.beams, np.int64(0))
        whole = op.concat([past, new], 2)
        self.sinks.append(ov.opset6.assign(whole, variable))
        self.variables.append(variable)
        return whole

    def _repeated(self, x: Any, count: int) -> Any:
        groups, size = self.config["num_key_value_heads"], self.config["head_dim"]
        wide = op.unsqueeze(x, np.array([2]))
        target = np.array([1, 1, count, 1, 1])
        wide = op.broadcast(wide, target, broadcast_spec="bidirectional")
        return op.reshape(wide, np.array([0, groups * count, -1, size]), special_zero=True)

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        size = self.config["head_dim"]
        steps = 1.0 / self.config["rope_theta"] ** (np.arange(0, size, 2) / size)
        wide = op.unsqueeze(op.convert(positions, "f32"), np.array([1, 3]))
        angle = op.multiply(wide, steps.astype(np.float32).reshape(1, 1, 1, -1))
        both = op.concat([angle, angle], -1)
        return op.cos(both), op.sin(both)

    def _rotated(self, x: Any) -> Any:
        halves = op.split(x, np.int64(3), 2)
        turned = op.concat([op.multiply(halves.output(1), np.float32(-1)), halves.output(0)], -1)
        return op.add(op.multiply(x, self.cos), op.multiply(turned, self.sin))


def main(folder: Path, output: Path) -> None:
    """Write the model."""
    output.mkdir(parents=True, exist_ok=True)
    model = Writer(folder).model()
    ov.save_model(model, output / "openvino_model.xml", compress_to_fp16=False)


main(Path(sys.argv[1]), Path(sys.argv[2]))
