"""Reads a Hugging Face checkpoint folder lazily: names, shapes and byte ranges first, bytes only on request.

Understands a single ``model.safetensors``, a sharded ``model.safetensors.index.json``, and the drafter adapter in ``linear_spec_lora/``.
The safetensors layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.errors import CheckpointError
from trimode.graphs.config import ModelConfig, load_config, read_json

ADAPTER_FOLDER = "linear_spec_lora"
ADAPTER_PREFIX = "base_model.model."
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation
_DOWNLOAD_HINT = "download the checkpoint again; the file is incomplete or was changed"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``.
        offset: bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def chunks(self, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """Yield the tensor's raw bytes in order, ``chunk_bytes`` at a time."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            left = self.num_bytes
            while left:
                data = stream.read(min(left, chunk_bytes))
                if not data:
                    raise CheckpointError(f"{self.file}: expected {left} more bytes, found the end of the file", _DOWNLOAD_HINT)
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Drafter:
    """The adapter of the draft graph (LoRA on ``o_proj``): its branch is scaled by ``alpha / rank``."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; every tensor the trunk needs is known to be there with the right shape.

    Attributes:
        tensors: by the checkpoint's names, in the trunk's order, the adapter's after all others and named ``encoder...o_proj.lora_A.weight``.
        drafter: the adapter's shape, or None where there is none.
        adapter: the adapter's folder, or None where there is none.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    drafter: Drafter | None
    adapter: Path | None = None


def open_checkpoint(path: Path, adapter: Path | None = None) -> Checkpoint:
    """Open a checkpoint folder without reading any weight.

    Args:
        path: the folder.
        adapter: folder of a drafter adapter that takes the place of the checkpoint's own; None = its own, where it has one.

    Raises:
        CheckpointError: a file is missing, truncated or malformed; a tensor is missing, unknown, or of another shape or type;
            the architecture, the rope type or the adapter is not one this library compiles.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint folder, found {'a file' if path.exists() else 'nothing'}",
                              "download one first, e.g. `hf download nvidia/Nemotron-Labs-Diffusion-8B --local-dir DIR`")  # fmt: skip
    config = load_config(path)
    tensors = _match(_read_weights(path), expected_tensors(config), str(path))
    if adapter is None and (path / ADAPTER_FOLDER).is_dir():
        adapter = path / ADAPTER_FOLDER
    if adapter is None:
        return Checkpoint(path, config, tensors, None)
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter}: expected the folder of a drafter adapter, found {'a file' if adapter.exists() else 'nothing'}",
                              "make one with `trimode calibrate drafter CHECKPOINT --data PROMPTS.jsonl -o ADAPTER`")  # fmt: skip
    drafter = _read_adapter_config(adapter / "adapter_config.json")
    entries = {name.removeprefix(ADAPTER_PREFIX): entry for name, entry in read_safetensors_header(adapter / "adapter_model.safetensors").items()}
    tensors.update(_match(entries, expected_adapter_tensors(config, drafter.rank), str(adapter)))
    return Checkpoint(path, config, tensors, drafter, adapter)


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of :attr:`Checkpoint.tensors` is the drafter's."""
    return ".lora_" in name


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trunk's weights, ``9 * num_hidden_layers + 3`` of them."""
    hidden, query, key_value, inner = config.hidden_size, config.query_size, config.key_value_size, config.intermediate_size
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"encoder.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes.update({f"encoder.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    return {**shapes, "encoder.norm.weight": (hidden,), "diffusion_head.weight": (config.vocab_size, hidden)}


def expected_adapter_tensors(config: ModelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the drafter's weights, without the adapter file's prefix."""
    return {
        f"encoder.layers.{i}.self_attn.o_proj.lora_{half}.weight": shape
        for i in range(config.num_hidden_layers)
        for half, shape in (("A", (rank, config.query_size)), ("B", (config.hidden_size, rank)))
    }


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors header and check that the file holds exactly the bytes it promises."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: expected a safetensors header of {length} bytes, found a file of {size} bytes", _DOWNLOAD_HINT)
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a file, found none", "download the missing file into the checkpoint folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found one that cannot be read ({error})", _DOWNLOAD_HINT) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, found {type(header).__name__}", _DOWNLOAD_HINT)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    end = max((e.offset + e.num_bytes for e in entries.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{path}: expected {end} bytes, found {size}", _DOWNLOAD_HINT)
    return entries


def to_float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    """Raw bytes of a ``F32``, ``F16`` or ``BF16`` tensor as float32; each of these values is exact in float32."""
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _read_weights(path: Path) -> dict[str, TensorEntry]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_safetensors_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names, found something else", _DOWNLOAD_HINT)
    shards = {name: read_safetensors_header(path / name) for name in sorted(set(weight_map.values()))}
    lost = [tensor for tensor, shard in weight_map.items() if tensor not in shards[shard]]
    if lost:
        raise CheckpointError(f"{path / weight_map[lost[0]]}: expected the tensor {lost[0]} that the index places there, found none", _DOWNLOAD_HINT)
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = str(value["dtype"]), tuple(int(d) for d in value["shape"]), value["data_offsets"]
        num_bytes = int(end) - int(begin)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: expected dtype, shape and data_offsets for {name}, found {value!r}", _DOWNLOAD_HINT) from error
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: expected {name} to be one of {', '.join(ITEM_SIZES)}, found {dtype}",
                              "start from the published 16-bit checkpoint; quantization is a step of its own")  # fmt: skip
    if begin < 0 or num_bytes != int(np.prod(shape, dtype=np.int64)) * ITEM_SIZES[dtype]:
        raise CheckpointError(f"{path}: expected {name} to have the bytes of {dtype} {list(shape)}, found {num_bytes}", _DOWNLOAD_HINT)
    return TensorEntry(path, dtype, shape, data_start + int(begin), num_bytes)


def _match(found: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], where: str) -> dict[str, TensorEntry]:
    """The found tensors in the expected order, or an error that names the first few that are missing, unknown or misshapen."""
    missing, unknown = [n for n in expected if n not in found], [n for n in found if n not in expected]
    for kind, names in (("is missing", missing), ("is not part of this architecture", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{where}: expected {len(expected)} tensors, found that {names[0]} {kind}{more}",
                                  "check that config.json and the weights belong to the same checkpoint")  # fmt: skip
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{where}: expected {name} of shape {list(shape)}, found {list(found[name].shape)}",
                                  "check that config.json and the weights belong to the same checkpoint")  # fmt: skip
    return {name: found[name] for name in expected}


def _read_adapter_config(path: Path) -> Drafter:
    values = read_json(path)
    expected = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False}
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise CheckpointError(f"{path}: expected {name} {value!r}, found {values[name]!r}", "only a plain LoRA adapter can be a drafter")
    targets = values.get("target_modules")
    if [targets] != [["o_proj"]] and targets != "o_proj":
        raise CheckpointError(f"{path}: expected target_modules ['o_proj'], found {targets!r}", "only an adapter on o_proj can be a drafter")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: expected a rank r of at least 1 and a number lora_alpha, found {rank!r} and {alpha!r}", _DOWNLOAD_HINT)
    return Drafter(rank, float(alpha))
