"""Reads ``config.json`` of a Nemotron-Labs-Diffusion checkpoint, every rope field taken literally.

A value that changes what the model computes is either understood or refused; nothing is guessed from another field
(``head_dim`` is not ``hidden_size / num_attention_heads`` in this family).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import CheckpointError

ARCHITECTURE = "NemotronLabsDiffusionModel"
MODEL_TYPE = "nemotron_labs_diffusion"
SUPPORTED_ROPE_TYPES = ("default", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) with YaRN scaling (Peng et al. 2023) and the Llama-4 query scale.

    Attributes:
        rope_type: ``default`` or ``yarn``.
        theta: base of the geometric series of wavelengths.
        factor: YaRN interpolation factor; below 1 it extrapolates (inverse frequencies are multiplied).
        original_max_position_embeddings: length in tokens before scaling.
        beta_fast, beta_slow: rotations over the original length at which the ramp begins and ends.
        attention_factor: multiplier of cos and sin; None = derived from ``mscale`` and ``mscale_all_dim``.
        mscale, mscale_all_dim: see :func:`trimode.graphs.rope.attention_factor`.
        truncate: whether the ramp's ends are rounded to whole frequency indices.
        query_scale_beta: ``q *= 1 + beta * ln(1 + floor(position / original))``; None = no scale.
    """

    rope_type: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    query_scale_beta: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The fields of ``config.json`` that decide what the graphs compute; names as in the file."""

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
        """Width of the query projection, ``num_attention_heads * head_dim``; differs from ``hidden_size`` at 3B and 14B."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the key and of the value projection."""
        return self.num_key_value_heads * self.head_dim


class _Fields:
    """A JSON object whose fields are read with their type checked; errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"a whole number of at least {least}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional_number(name, default)
        if value is None:
            raise self.wrong(name, "a number", value)
        return value

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number", value)
        return float(value)

    def token_ids(self, name: str, default: int) -> tuple[int, ...]:
        value = self.values.get(name, default)
        ids = value if isinstance(value, list) else [value]
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.wrong(name, "a token id or a list of them", value)
        return tuple(ids)

    def refuse_unless(self, name: str, expected: tuple[Any, ...]) -> None:
        value = self.values.get(name, expected[0])
        if value not in expected:
            raise self.wrong(name, " or ".join(json.dumps(e) for e in expected), value)

    def wrong(self, name: str, expected: str, found: Any) -> CheckpointError:
        shown = "nothing" if found is None else json.dumps(found)
        return CheckpointError(
            f"{self.where}: expected {name} to be {expected}, found {shown}",
            "check that the file belongs to a Nemotron-Labs-Diffusion text checkpoint",
        )


def load_config(checkpoint: Path) -> ModelConfig:
    """Read ``config.json`` (and the end tokens of ``generation_config.json``) of a checkpoint folder.

    Raises:
        CheckpointError: a file is missing or not JSON, the architecture or a rope type is another, a field has a wrong value.
    """
    path = checkpoint / "config.json"
    config = parse_config(read_json(path), where=str(path))
    generation = checkpoint / "generation_config.json"
    if not generation.exists():
        return config
    values = read_json(generation)
    if values.get("eos_token_id") is None:
        return config
    ids = _Fields(values, str(generation)).token_ids("eos_token_id", 0)
    _check_ids("eos_token_id", ids, config.vocab_size, str(generation))
    return ModelConfig(**{**config.__dict__, "eos_token_ids": ids})


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the contents of ``config.json`` into a :class:`ModelConfig`; missing fields take the family's defaults."""
    fields = _Fields(values, where)
    _check_architecture(values, where)
    for name, expected in (
        ("hidden_act", ("silu",)),
        ("attention_bias", (False,)),
        ("mlp_bias", (False,)),
        ("tie_word_embeddings", (False,)),
        ("sliding_window", (None,)),
    ):
        fields.refuse_unless(name, expected)
    vocab_size = fields.integer("vocab_size", 131072)
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size", 4096),
        intermediate_size=fields.integer("intermediate_size", 14336),
        num_hidden_layers=fields.integer("num_hidden_layers", 34),
        num_attention_heads=fields.integer("num_attention_heads", 32),
        num_key_value_heads=fields.integer("num_key_value_heads", 8),
        head_dim=fields.integer("head_dim", 128),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        rope=_parse_rope(values, where),
        mask_token_id=fields.integer("mask_token_id", -1, least=0),
        bos_token_id=None if values.get("bos_token_id", 1) is None else fields.integer("bos_token_id", 1, least=0),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
        block_size=fields.integer("block_size", 32),
    )
    _check_consistency(config, where)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise :class:`CheckpointError` when it is missing, not readable, or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a file, found none", "point at the folder that holds config.json and model.safetensors") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected a JSON file, found one that cannot be read ({error})", "download the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}", "download the file again")
    return values


def _check_architecture(values: Mapping[str, Any], where: str) -> None:
    found = (values.get("architectures") or [None])[0], values.get("model_type")
    if ARCHITECTURE in found or (found[0] is None and found[1] == MODEL_TYPE):
        return
    raise CheckpointError(
        f"{where}: expected the architecture {ARCHITECTURE}, found {found[0] or found[1] or 'none'}",
        "trimode compiles Nemotron-Labs-Diffusion text checkpoints (3B, 8B, 14B; base and instruct)",
    )


def _parse_rope(values: Mapping[str, Any], where: str) -> RopeConfig:
    # Newer files say rope_parameters, older ones rope_scaling beside a top-level rope_theta; both may be present and mirrored.
    raw = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise _Fields(values, where).wrong("rope_parameters", "an object", raw)
    fields = _Fields({"rope_theta": values.get("rope_theta", 1e6), **raw}, f"{where}: rope_parameters")
    rope_type = raw.get("rope_type", raw.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise fields.wrong("rope_type", " or ".join(SUPPORTED_ROPE_TYPES), rope_type)
    fields.refuse_unless("partial_rotary_factor", (None, 1, 1.0))
    beta = fields.optional_number("llama_4_scaling_beta")
    theta = fields.number("rope_theta")
    if rope_type == "default" and not beta:
        return RopeConfig(rope_type, theta)
    original = fields.integer("original_max_position_embeddings", values.get("max_position_embeddings"))
    if rope_type == "default":
        return RopeConfig(rope_type, theta, original_max_position_embeddings=original, query_scale_beta=beta)
    rope = RopeConfig(
        rope_type,
        theta,
        factor=fields.number("factor"),
        original_max_position_embeddings=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=bool(raw.get("truncate", True)),
        query_scale_beta=beta or None,
    )
    if rope.factor <= 0 or rope.theta <= 1:
        raise fields.wrong("factor and rope_theta", "above 0 and above 1", [rope.factor, rope.theta])
    return rope


def _check_consistency(config: ModelConfig, where: str) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, "
            f"found {config.num_attention_heads} and {config.num_key_value_heads}",
            "check config.json against the one that was published",
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{where}: expected an even head_dim, found {config.head_dim}", "check config.json against the one that was published")
    _check_ids("mask_token_id", (config.mask_token_id,), config.vocab_size, where)
    _check_ids("eos_token_id", config.eos_token_ids, config.vocab_size, where)


def _check_ids(name: str, ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    for token_id in ids:
        if token_id >= vocab_size:
            raise CheckpointError(f"{where}: expected {name} below vocab_size {vocab_size}, found {token_id}", "use the published file")
