"""Reads ``config.json`` of a Nemotron-Labs-Diffusion checkpoint, every field taken literally.

A value that changes what the model computes is either understood or refused; nothing is guessed
from another field (``head_dim`` is not ``hidden_size / num_attention_heads`` in this family).
:mod:`trimode.graphs.config_keys` says for each key which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import CheckpointError
from trimode.formats.json_fields import Fields, check_keys, is_integer, named, read_object
from trimode.graphs.config_keys import CONFIG_KEYS, GENERATION_KEYS
from trimode.graphs.rope_config import RopeConfig, check_layer_types, parse_rope

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "ModelConfig", "RopeConfig", "load_config", "parse_config"]

ARCHITECTURE = "NemotronLabsDiffusionModel"
MODEL_TYPE = "nemotron_labs_diffusion"
_MOST_LAYERS = 4096  # far above any model of the family; each has tensors that are listed
_ADVICE = "check that the file belongs to a Nemotron-Labs-Diffusion text checkpoint"
_PUBLISHED = "check config.json against the one that was published"


@dataclass(frozen=True)
class ModelConfig:
    """Holds the fields that decide what the graphs compute.

    Names are as in the file.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    mask_token_id: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    block_size: int

    @property
    def query_size(self) -> int:
        """Width of the query projection; differs from ``hidden_size`` at 3B and 14B."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the key and of the value projection."""
        return self.num_key_value_heads * self.head_dim


def load_config(checkpoint: Path) -> ModelConfig:
    """Read ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    The end tokens are those of the second file where it names any, else those of the first.

    Raises:
        CheckpointError: a file is missing or not JSON, the architecture or a rope type is another,
            a field has a wrong value, or a key is unknown.
    """
    path = checkpoint / "config.json"
    values = read_object(path, "point at the folder that holds config.json and model.safetensors")
    generation = checkpoint / "generation_config.json"
    if not generation.exists() and not generation.is_symlink():
        return parse_config(values, str(path))
    end_tokens = read_object(generation, "download the file that the link means, or remove it")
    check_keys(
        end_tokens, GENERATION_KEYS, str(generation), "remove the key to go on without its effect"
    )
    return parse_config(values, str(path), generation=end_tokens)


def parse_config(
    values: Mapping[str, Any],
    where: str = "config.json",
    *,
    generation: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Turn the contents of ``config.json`` into a :class:`ModelConfig`.

    Args:
        values: The object; missing fields take the family's defaults.
        where: The file, for messages.
        generation: Contents of the ``generation_config.json`` beside it.

    Raises:
        CheckpointError: see :func:`load_config`.
    """
    _check_architecture(values, where)
    check_keys(values, CONFIG_KEYS, where, _ADVICE)
    fields = Fields(values, where, _ADVICE)
    has_bos = values.get("bos_token_id", 1) is not None
    vocab_size = fields.integer("vocab_size", 131072)
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size", 4096),
        intermediate_size=fields.integer("intermediate_size", 14336),
        num_hidden_layers=fields.integer("num_hidden_layers", 34, most=_MOST_LAYERS),
        num_attention_heads=fields.integer("num_attention_heads", 32),
        num_key_value_heads=fields.integer("num_key_value_heads", 8),
        head_dim=fields.integer("head_dim", 128),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        rope=parse_rope(values, where),
        mask_token_id=fields.integer("mask_token_id", -1, least=0),
        bos_token_id=fields.integer("bos_token_id", 1, least=0) if has_bos else None,
        eos_token_ids=_end_tokens(values, generation or {}, vocab_size, where),
        block_size=fields.integer("block_size", 32),
    )
    check_layer_types(values, config.num_hidden_layers, where)
    _check_consistency(config, fields)
    return config


def _check_architecture(values: Mapping[str, Any], where: str) -> None:
    fields = Fields(values, where, _ADVICE)
    classes, model_type = values.get("architectures"), values.get("model_type")
    if classes is not None and not _are_names(classes):
        raise fields.wrong("architectures", "a list of names", classes)
    if model_type is not None and not isinstance(model_type, str):
        raise fields.wrong("model_type", "a name", model_type)
    first = classes[0] if classes else model_type or "none"
    is_ours = first == ARCHITECTURE if classes else model_type == MODEL_TYPE
    if is_ours and model_type in (None, MODEL_TYPE):
        return
    found = model_type if is_ours and model_type else first
    raise CheckpointError(
        f"{where}: expected the architecture {ARCHITECTURE}, found {named(found)}",
        "trimode compiles Nemotron-Labs-Diffusion text checkpoints "
        "(3B, 8B, 14B; base and instruct)",
    )


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(one, str) for one in values)


def _end_tokens(
    values: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int, where: str
) -> tuple[int, ...]:
    source, place = values, where
    if generation.get("eos_token_id") is not None:
        source, place = generation, str(Path(where).with_name("generation_config.json"))
    found = source.get("eos_token_id", 2)  # 2 is what the family's class takes
    advice = "name the end tokens there or in generation_config.json" if found is None else _ADVICE
    fields = Fields(source, place, advice)
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(is_integer(one) and one >= 0 for one in ids):
        raise fields.wrong("eos_token_id", "a token id or a list of them", found)
    if max(ids) >= vocab_size:
        raise fields.wrong("eos_token_id", f"below vocab_size {vocab_size}", found)
    return tuple(ids)


def _check_consistency(config: ModelConfig, fields: Fields) -> None:
    fields = Fields(fields.values, fields.where, _PUBLISHED)
    if not 0 < config.rms_norm_eps < 1:
        raise fields.wrong("rms_norm_eps", "above 0 and below 1", config.rms_norm_eps)
    heads = config.num_attention_heads, config.num_key_value_heads
    if heads[0] % heads[1]:
        raise fields.wrong(
            "num_attention_heads", f"a multiple of num_key_value_heads {heads[1]}", heads[0]
        )
    if config.head_dim % 2:
        raise fields.wrong("head_dim", "even", config.head_dim)
    for name, token_id in (
        ("mask_token_id", config.mask_token_id),
        ("bos_token_id", config.bos_token_id),
    ):
        if token_id is not None and token_id >= config.vocab_size:
            raise fields.wrong(name, f"below vocab_size {config.vocab_size}", token_id)
