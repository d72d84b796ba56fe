"""Reads the rope fields of ``config.json``, however transformers wrote them.

Newer files have ``rope_parameters``, flat or nested by layer type; older ones ``rope_scaling``
beside a top-level ``rope_theta``. A file may have both, mirrored. Where two places disagree, the
file is refused: which of them counts has changed between versions of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimode.errors import CheckpointError
from trimode.formats.json_fields import Fields, check_keys, shown
from trimode.graphs.config_keys import ROPE_KEYS

SUPPORTED_ROPE_TYPES = ("default", "yarn")
FULL_ATTENTION = ("full_attention", "attention")  # the second is transformers' former name
_ADVICE = "use the rope fields of the published config.json"
_LEAST, _MOST = 1e-6, 1e6  # far beyond any model, and within what float32 tables can hold
_TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_YARN_ALONE = (
    "factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


@dataclass(frozen=True)
class RopeConfig:
    """Describes the rotary position embedding (Su et al. 2021).

    It has YaRN (Peng et al. 2023) and the Llama-4 query scale.

    Attributes:
        rope_type: ``default`` or ``yarn``.
        theta: Base of the geometric series of wavelengths.
        factor: YaRN interpolation factor; below 1 it extrapolates (inverse frequencies are
        multiplied).
        original_max_position_embeddings: Length in tokens before scaling.
        beta_fast, beta_slow: Rotations over the original length at which the ramp begins and ends.
        attention_factor: Multiplier of cos and sin; None = derived from ``mscale`` and
        ``mscale_all_dim``.
        mscale, mscale_all_dim: Inputs of :func:`trimode.graphs.decoder.rope.attention_factor`.
        truncate: Whether the ramp's ends are rounded to whole frequency indices.
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


def parse_rope(values: Mapping[str, Any], where: str) -> RopeConfig:
    """Read the rope fields of the contents of ``config.json``.

    Raises:
        CheckpointError: a field is unknown, has a wrong value, or is there twice and differs.
    """
    raw, name = _rope_object(values, where)
    place = f"{where}: {name}"
    raw = _with_top_level(_flat(raw, place), values, where)
    check_keys(raw, ROPE_KEYS, place, _ADVICE)
    fields = Fields(raw, place, _ADVICE)
    rope_type = _rope_type(fields)
    theta = _or(fields.optional_number("rope_theta"), 1e6)
    if theta <= 1:
        raise fields.wrong("rope_theta", "above 1", theta)
    beta = _within(fields, "llama_4_scaling_beta", least=0) or None
    original = _original_length(fields, values)
    if rope_type == "yarn":
        return _parse_yarn(fields, theta, original, beta)
    for key in _YARN_ALONE:
        if raw.get(key) is not None:
            raise fields.wrong(f"{key} beside rope_type default", "absent", raw[key])
    return RopeConfig(
        rope_type,
        theta,
        original_max_position_embeddings=original if beta else 0,
        query_scale_beta=beta,
    )


def _parse_yarn(fields: Fields, theta: float, original: int, beta: float | None) -> RopeConfig:
    if fields.values.get("factor") is None:  # transformers derives it; this family's files say it
        raise fields.wrong("factor", "a number", None)
    rope = RopeConfig(
        "yarn",
        theta,
        factor=_or(_within(fields, "factor"), 1.0),
        original_max_position_embeddings=original,
        beta_fast=_or(_within(fields, "beta_fast"), 32.0),
        beta_slow=_or(_within(fields, "beta_slow"), 1.0),
        attention_factor=_within(fields, "attention_factor"),
        mscale=_within(fields, "mscale", least=0),
        mscale_all_dim=_within(fields, "mscale_all_dim", least=0),
        truncate=fields.boolean("truncate", default=True),
        query_scale_beta=beta,
    )
    if rope.beta_slow > rope.beta_fast:
        raise fields.wrong("beta_slow", f"up to beta_fast {rope.beta_fast}", rope.beta_slow)
    return rope


def _rope_object(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """Return the object with the rope fields, and its name.

    The object is empty where the file has none.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = values.get(name)
        if value is not None and not isinstance(value, dict):
            raise Fields(values, where, _ADVICE).wrong(name, "an object", value)
        if value:
            found[name] = value
    if len(found) == 2:
        _check_mirror(found["rope_parameters"], found["rope_scaling"], where)
    return next(((value, name) for name, value in found.items()), ({}, "rope_parameters"))


def _check_mirror(new: Mapping[str, Any], old: Mapping[str, Any], where: str) -> None:
    """Refuse a ``rope_scaling`` that says something else than ``rope_parameters``."""
    # The older object may lack fields, such as rope_theta, and says type for rope_type.
    place = f"{where}: rope_scaling"
    fields, mirrored = (
        _untyped(_flat(new, f"{where}: rope_parameters")),
        _untyped(_flat(old, place)),
    )
    for key, value in mirrored.items():
        if value is not None and fields.get(key) != value:
            raise Fields(old, where, _ADVICE).wrong(
                f"{key} of rope_scaling", f"{shown(fields.get(key))} as in rope_parameters", value
            )


def _untyped(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with their type under one name."""
    named = {key: value for key, value in raw.items() if key not in ("rope_type", "type")}
    return {**named, "rope_type": raw.get("rope_type", raw.get("type"))}


def _flat(raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the rope fields of the one type of attention.

    They may be nested by type.
    """
    nested = {key: value for key, value in raw.items() if _is_layer_type(key, value)}
    if not nested:
        return dict(raw)
    fields = Fields(raw, place, _ADVICE)
    for key, value in raw.items():
        if key not in nested and value is not None:
            raise fields.wrong(key, "inside each layer type, where the others are", value)
    used = next((nested[key] for key in FULL_ATTENTION if nested.get(key)), None)
    if used is None:
        raise fields.wrong("its layer types", "full_attention with its fields", nested)
    for key, value in nested.items():
        if value not in (None, used):
            raise fields.wrong(key, "the same as full_attention, the one type used", value)
    return dict(used)


def _is_layer_type(key: str, value: Any) -> bool:
    """Tell whether an entry is one of those nested by layer type.

    Null there means no rotation at all.
    """
    return key.endswith("attention") and (value is None or isinstance(value, dict))


def _with_top_level(raw: dict[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields, and those that lie beside their object."""
    for name in _TOP_LEVEL:
        beside = values.get(name)
        if beside is None:
            continue
        inside = raw[name] = beside if raw.get(name) is None else raw[name]
        if inside != beside or isinstance(inside, bool) != isinstance(beside, bool):
            raise Fields(values, where, _ADVICE).wrong(
                name, f"{shown(inside)} as in the rope fields", beside
            )
    return raw


def _rope_type(fields: Fields) -> str:
    new, old = (fields.values.get(name) for name in ("rope_type", "type"))
    rope_type = "default" if new is None and old is None else old if new is None else new
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise fields.wrong("rope_type", " or ".join(SUPPORTED_ROPE_TYPES), rope_type)
    if old is not None and old != rope_type:
        raise fields.wrong("type", f"{shown(rope_type)} as rope_type", old)
    return str(rope_type)


def _original_length(fields: Fields, values: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    if fields.values.get(name) is None:  # transformers takes the whole length then
        return Fields(values, fields.where, _ADVICE).integer("max_position_embeddings", 262144)
    return fields.integer(name)


def _within(fields: Fields, name: str, least: float = _LEAST) -> float | None:
    value = fields.optional_number(name)
    if value is not None and not least <= value <= _MOST:
        raise fields.wrong(name, f"between {least:g} and {_MOST:g}", value)
    return value


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def check_layer_types(values: Mapping[str, Any], num_layers: int, where: str) -> None:
    """Refuse ``layer_types`` that are anything but full attention in every layer.

    Raises:
        CheckpointError: says which layer differs.
    """
    types = values.get("layer_types")
    if types is None:
        return
    fields = Fields(values, where, "trimode compiles layers with full attention alone")
    if not isinstance(types, list):
        raise fields.wrong("layer_types", "a list", types)
    for index, one in enumerate(types):
        if one not in FULL_ATTENTION:
            raise fields.wrong(f"layer_types[{index}]", shown(FULL_ATTENTION[0]), one)
    if len(types) != num_layers:
        raise CheckpointError(
            f"{where}: expected layer_types of {num_layers} layers, found {len(types)}",
            "check config.json against the one that was published",
        )
