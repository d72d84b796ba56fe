"""Opens a Hugging Face checkpoint folder lazily.

Names, shapes and byte ranges come first, bytes only on request.

Understands a single ``model.safetensors``, a sharded ``model.safetensors.index.json``, and the
drafter adapter in ``linear_spec_lora/``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import CheckpointError, UsageError
from trimode.formats.contract import DEFAULT_MAX_LENGTH, MAX_BLOCK_LENGTH, ModelInfo
from trimode.formats.json_fields import named, read_object
from trimode.formats.safetensors import (
    DOWNLOAD_HINT,
    TensorEntry,
    check_readable,
    read_safetensors_header,
)
from trimode.graphs.adapter import ADAPTER_FOLDER, Drafter, open_adapter
from trimode.graphs.config import ModelConfig, load_config

# Tables that old versions of transformers saved beside the weights; every loader makes them anew
# from config.json.
_ROTARY_BUFFER = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)
_SAME_HINT = "check that config.json and the weights belong to the same checkpoint"
_OUTPUT_HINT = (
    "this family's output matrix is diffusion_head.weight; remove the other if it is a copy"
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """Holds an opened checkpoint: every tensor is there with the right shape.

    Attributes:
        path: Folder of the checkpoint.
        config: Contents of ``config.json``.
        tensors: Tensors by the checkpoint's names, in the trunk's order. The adapter's come after
            all others and are named ``encoder...o_proj.lora_A.weight``.
        drafter: Shape of the adapter; None where there is none.
        adapter: Folder of the adapter; None where there is none.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    drafter: Drafter | None
    adapter: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes in order, as they lie in the file.

        Raises:
            CheckpointError: the file has gone or become shorter since it was opened.
        """
        return self.tensors[name].chunks()


Read = Callable[[str], Iterator[bytes]]
"""Yields the bytes of a tensor by its name, as :meth:`Checkpoint.read` does."""


def open_checkpoint(path: Path, adapter: Path | None = None) -> Checkpoint:
    """Open a checkpoint folder without reading any weight.

    Args:
        path: The folder.
        adapter: Folder of a drafter adapter that takes the place of the checkpoint's own; None =
            its own, where it has one.

    Raises:
        CheckpointError: a file is missing, truncated or malformed; a tensor is missing, unknown, or
            of another shape or type; the architecture, the rope type or the adapter is not one this
            library compiles.
    """
    found = _found_instead_of_folder(path)
    if found:
        raise CheckpointError(
            f"{path}: expected a checkpoint folder, found {found}",
            "download one first, "
            "e.g. `hf download nvidia/Nemotron-Labs-Diffusion-8B --local-dir DIR`",
        )
    config = load_config(path)
    tensors = _match(_read_weights(path), expected_tensors(config), str(path))
    own = path / ADAPTER_FOLDER
    if adapter is None and _found_instead_of_folder(own) != "nothing":
        adapter = own
    if adapter is None:
        return Checkpoint(path, config, tensors, None)
    found = _found_instead_of_folder(adapter)
    if found:
        raise CheckpointError(
            f"{adapter}: expected the folder of a drafter adapter, found {found}",
            "make one with `trimode calibrate drafter CHECKPOINT --data PROMPTS.jsonl -o ADAPTER`",
        )
    drafter, adapter_tensors = open_adapter(adapter, config)
    return Checkpoint(path, config, {**tensors, **adapter_tensors}, drafter, adapter)


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of :attr:`Checkpoint.tensors` is the drafter's."""
    return ".lora_" in name


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trunk's weights.

    There are ``9 * num_hidden_layers + 3`` of them.
    """
    hidden, query, key_value, inner = (
        config.hidden_size,
        config.query_size,
        config.key_value_size,
        config.intermediate_size,
    )
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
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens.weight": (config.vocab_size, hidden)
    }
    for i in range(config.num_hidden_layers):
        shapes.update({f"encoder.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    return {
        **shapes,
        "encoder.norm.weight": (hidden,),
        "diffusion_head.weight": (config.vocab_size, hidden),
    }


def _found_instead_of_folder(path: Path) -> str:
    """What lies where a folder should, in words; empty for a folder."""
    try:
        if path.is_dir():
            return ""
        return (
            "a link to a folder that is not there"
            if path.is_symlink() and not path.exists()
            else "a file"
            if path.exists()
            else "nothing"
        )
    except OSError:  # a name too long, or a folder that may not be entered
        return "nothing"


def _read_weights(path: Path) -> dict[str, TensorEntry]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists() or single.is_symlink():
        return read_safetensors_header(single)
    if index.exists() or index.is_symlink():
        return _read_shards(path, index)
    pickled = next((name for name in _PICKLES if (path / name).exists()), None)
    if pickled is not None:
        raise CheckpointError(
            f"{single}: expected a file, "
            f"found {pickled} in its place, a pickle, which trimode does not open",
            "load the model with transformers and save it again "
            "with save_pretrained(DIR, safe_serialization=True)",
        )
    return read_safetensors_header(single)


def _read_shards(path: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map: Any = read_object(
        index, "download the missing file into the checkpoint folder"
    ).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(
            f"{index}: expected a weight_map from tensor names to file names, found something else",
            DOWNLOAD_HINT,
        )
    shards = {
        name: read_safetensors_header(path / name) for name in sorted(set(weight_map.values()))
    }
    lost = [tensor for tensor, shard in weight_map.items() if tensor not in shards[shard]]
    if lost:
        raise CheckpointError(
            f"{path / weight_map[lost[0]]}: expected the tensor {named(lost[0])} "
            "that the index places there, found none",
            DOWNLOAD_HINT,
        )
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _match(
    found: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, TensorEntry]:
    """Put the found tensors in the expected order.

    An error names the first few that are missing, unknown or misshapen.
    """
    missing = [name for name in expected if name not in found]
    unknown = [
        name for name in found if name not in expected and not _ROTARY_BUFFER.fullmatch(name)
    ]
    for kind, names in (("is missing", missing), ("is not part of this architecture", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            hint = _OUTPUT_HINT if names[0].endswith("lm_head.weight") else _SAME_HINT
            raise CheckpointError(
                f"{where}: expected {len(expected)} tensors, "
                f"found that {named(names[0])} {kind}{more}",
                hint,
            )
    for name, shape in expected.items():
        check_readable(name, found[name])
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: expected {name} of shape {list(shape)}, found {list(found[name].shape)}",
                _SAME_HINT,
            )
    return {name: found[name] for name in expected}


def describe_model(checkpoint: Checkpoint, max_length: int | None = None) -> ModelInfo:
    """Give the facts that decoding needs.

    Args:
        checkpoint: Opened checkpoint.
        max_length: Limit on the tokens of prompt and answer together; None = the model's limit, at
            most 32768.

    Raises:
        UsageError: ``max_length`` is out of range.
    """
    config = checkpoint.config
    limit = config.max_position_embeddings
    if max_length is None:
        max_length = min(limit, DEFAULT_MAX_LENGTH)
    if not 2 <= max_length <= limit:
        raise UsageError(
            f"expected a maximum length from 2 to {limit} (the model's max_position_embeddings), "
            f"found {max_length}",
            "choose `max_length` in that range",
        )
    return ModelInfo(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mask_token_id=config.mask_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        block_size=min(config.block_size, MAX_BLOCK_LENGTH),
        max_length=max_length,
        max_block_length=MAX_BLOCK_LENGTH,
        has_drafter=checkpoint.drafter is not None,
    )
