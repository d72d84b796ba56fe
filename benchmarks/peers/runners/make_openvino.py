"""Writes an OpenVINO model of a Llama checkpoint: ``make_openvino.py CHECKPOINT FOLDER f32|int4``.

The graph has the forms that the CPU plugin looks for, as those of optimum-intel's export do: a
state for each cache, attention as one operator, weights of four bits that are widened in the
product, in blocks of 128, and a head of eight bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from safetensors_lite import tensors

_BLOCK = 128
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


class Writer:
    """Adds the layers of a checkpoint to a graph."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.kind = kind
        self.weights = {
            name: self._constant(name, values)
            for name, values in tensors(folder / "model.safetensors")
        }
        self.sinks: list[Any] = []
        self.variables: list[Any] = []

    def model(self) -> ov.Model:
        """The graph: ids and positions to the logits of every row."""
        ids = op.parameter([1, -1], np.int64, name="input_ids")
        positions = op.parameter([1, -1], np.int64, name="position_ids")
        mask = op.parameter([1, 1, -1, -1], np.float32, name="mask")
        beams = op.parameter([-1], np.int32, name="beam_idx")
        self.mask, self.beams = mask, beams
        return self.layers(ids, positions, [ids, positions, mask, beams])

    def layers(self, ids: Any, positions: Any, inputs: list[Any]) -> ov.Model:
        """The graph behind the inputs; ``mask`` and ``beams`` are set."""
        self.cos, self.sin = self._angles(positions)
        x = op.gather(self.weights[_ENDS[0]], ids, np.int64(0))
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.", layer)
        x = self._norm(x, "model.norm.weight")
        logits = op.result(self._product(x, "lm_head.weight"), name="logits")
        logits.output(0).set_names({"logits"})
        found = ov.Model([logits], self.sinks, inputs, "llama")
        found.add_variables(self.variables)
        return found

    def _constant(self, name: str, values: np.ndarray) -> Any:
        if values.ndim == 1:
            return op.constant(values.reshape(1, 1, -1))
        if self.kind == "f32":
            return op.constant(values)
        if name in _ENDS:
            return _eight_bits(values)
        return _four_bits(values)

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
        return op.multiply(self.weights[name], op.multiply(x, op.divide(np.float32(1), root)))

    def _product(self, x: Any, name: str) -> Any:
        return op.matmul(x, self.weights[name], transpose_a=False, transpose_b=True)

    def _heads(self, x: Any, count: int) -> Any:
        shape = np.array([0, 0, count, self.config["head_dim"]])
        rows = op.reshape(x, shape, special_zero=True)
        return op.transpose(rows, np.array([0, 2, 1, 3]))

    def _attention(self, x: Any, prefix: str, index: int) -> Any:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query = self._heads(self._product(x, f"{prefix}q_proj.weight"), heads)
        key = self._heads(self._product(x, f"{prefix}k_proj.weight"), groups)
        value = self._heads(self._product(x, f"{prefix}v_proj.weight"), groups)
        key = self._cached(self._rotated(key), self.state_name("key", index))
        value = self._cached(value, self.state_name("value", index))
        factors = (self._repeated(one, heads // groups) for one in (key, value))
        query = self._rotated(query)
        read = op.scaled_dot_product_attention(query, *factors, self.mask)
        size = np.array([0, 0, heads * self.config["head_dim"]])
        rows = op.reshape(op.transpose(read, np.array([0, 2, 1, 3])), size, special_zero=True)
        return self._product(rows, f"{prefix}o_proj.weight")

    def state_name(self, kind: str, index: int) -> str:
        """Name of a layer's cache."""
        return f"{kind}.{index}"

    def empty_cache(self, groups: int, size: int) -> Any:
        """A cache without tokens."""
        return op.constant(np.zeros((1, groups, 0, size), np.float32))

    def _cached(self, new: Any, name: str) -> Any:
        groups, size = self.config["num_key_value_heads"], self.config["head_dim"]
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, groups, -1, size])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        past = ov.opset6.read_value(self.empty_cache(groups, size), variable)
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


def _four_bits(values: np.ndarray) -> Any:
    rows, columns = values.shape
    block = next(size for size in (_BLOCK, 64, 32) if columns % size == 0)
    blocks = values.reshape(rows, -1, block)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / 7, 1e-9).astype(np.float16)
    codes = np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7).astype(np.int8)
    flat = codes.reshape(-1, 2) & 0xF
    packed = (flat[:, 0] | flat[:, 1] << 4).astype(np.uint8)
    shape = [rows, columns // block, block]
    narrow = ov.op.Constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.i4))
    wide = op.multiply(op.convert(narrow, "f16"), op.constant(scale))
    whole = op.reshape(wide, np.array([rows, columns]), special_zero=False)
    return op.convert(whole, "f32")


def _eight_bits(values: np.ndarray) -> Any:
    scale = np.maximum(np.abs(values).max(-1, keepdims=True) / 127, 1e-9).astype(np.float16)
    codes = np.rint(values / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    wide = op.multiply(op.convert(op.constant(codes), "f16"), op.constant(scale))
    return op.convert(wide, "f32")


def main(folder: Path, output: Path, kind: str) -> None:
    """Write the model."""
    output.mkdir(parents=True, exist_ok=True)
    ov.save_model(Writer(folder, kind).model(), output / "model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
