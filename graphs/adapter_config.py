"""Reads a drafter's ``adapter_config.json``: branches, ranks and scales.

Module names are matched as PEFT matches them: a list by whole names or their ends, a text as a
regular expression over the whole name, the patterns of ranks and alphas by their first match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.formats.json_fields import (
    Fields,
    check_keys,
    is_integer,
    is_number,
    read_object,
    shown,
)
from trimode.graphs.adapter_keys import ADAPTER_KEYS

_ADVICE = "only a plain LoRA adapter on o_proj can be a drafter"
_ALL_LINEAR = "all-linear"
ADAPTER_HINT = (
    "download the adapter's two files again, "
    "or remove its folder from the checkpoint to build without a drafter"
)


@dataclass(frozen=True)
class AdapterConfig:
    """Holds the fields that decide what the branch computes.

    Names are as in the file.

    Attributes:
        target_modules: Names or their ends, or one regular expression; likewise
        ``exclude_modules``.
        layers_to_transform: Numbers of layers; None = every layer.
        layers_pattern: Regular expressions of what stands before the layer's number; none =
            anything.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def has_branch(self, module: str) -> bool:
        """Whether PEFT gives a linear layer of this name a branch."""
        if _matches(self.exclude_modules, module):
            return False
        if self.target_modules == _ALL_LINEAR:
            return True
        if not _matches(self.target_modules, module):
            return False
        # PEFT asks for the layer only where the end of a name matches, not where a whole one does.
        is_whole = isinstance(self.target_modules, str) or module in self.target_modules
        return (
            is_whole
            or self.layers_to_transform is None
            or self._layer(module) in self.layers_to_transform
        )

    def rank(self, module: str) -> int:
        """Rank of a module's branch."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        """Return the alpha of a module's branch, without rank stabilization.

        The scale is alpha / rank.
        """
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)
        return alpha * math.sqrt(self.rank(module)) if self.use_rslora else alpha

    def _layer(self, module: str) -> int | None:
        before = [rf"(?:^|.*?\.){one}" for one in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{one}\.(?P<index>\d+)\.", module) for one in before)
        return next((int(one["index"]) for one in found if one), None)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: the file is missing or not JSON, a key is unknown, or its value is one that
            trimode does not compile.
    """
    values = read_object(path, ADAPTER_HINT)
    check_keys(values, ADAPTER_KEYS, str(path), _ADVICE)
    fields = Fields(values, str(path), _ADVICE)
    targets = _names(fields, "target_modules")
    if not targets:
        raise fields.wrong(
            "target_modules",
            "names of modules or a regular expression",
            values.get("target_modules"),
        )
    layers = _layers(fields)
    if layers is not None and isinstance(targets, str):
        raise fields.wrong(
            "layers_to_transform beside a regular expression in target_modules",
            "absent",
            list(layers),
        )
    pattern = _names(fields, "layers_pattern")
    if pattern and layers is None:
        raise fields.wrong(
            "layers_pattern without layers_to_transform", "absent", values["layers_pattern"]
        )
    config = AdapterConfig(
        r=fields.integer("r"),
        lora_alpha=fields.number("lora_alpha"),
        use_rslora=fields.boolean("use_rslora", default=False),
        rank_pattern=_numbers(fields, "rank_pattern", integers=True),
        alpha_pattern=_numbers(fields, "alpha_pattern"),
        target_modules=targets,
        exclude_modules=_names(fields, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
    )
    _check_patterns(config, fields)
    return config


def _matches(targets: str | tuple[str, ...], module: str) -> bool:
    if isinstance(targets, str):
        return bool(targets) and re.fullmatch(targets, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in targets)


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), module)


def _names(fields: Fields, name: str) -> str | tuple[str, ...]:
    value = fields.values.get(name)
    if value is None:
        return ()
    if isinstance(value, str):
        return _ALL_LINEAR if name == "target_modules" and value.lower() == _ALL_LINEAR else value
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise fields.wrong(name, "names of modules or a regular expression", value)
    return tuple(value)


def _layers(fields: Fields) -> tuple[int, ...] | None:
    value = fields.values.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(is_integer(one) and one >= 0 for one in layers):
        raise fields.wrong("layers_to_transform", "numbers of layers", value)
    return tuple(layers)


def _numbers(fields: Fields, name: str, *, integers: bool = False) -> dict[str, Any]:
    value = fields.values.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fields.wrong(name, "an object of module names", value)
    inner = Fields(value, f"{fields.where}: {name}", fields.advice)
    return {key: inner.integer(key) if integers else inner.number(key) for key in value}


def _check_patterns(config: AdapterConfig, fields: Fields) -> None:
    """Refuse what is no regular expression, with the field's name."""
    as_patterns: dict[str, tuple[str, ...]] = {
        "rank_pattern": tuple(config.rank_pattern),
        "alpha_pattern": tuple(config.alpha_pattern),
        "layers_pattern": config.layers_pattern,
    }
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        as_patterns[name] = (value,) if isinstance(value, str) else ()
    for name, patterns in as_patterns.items():
        for one in patterns:
            try:
                re.compile(f"({one})")
            except (re.error, RecursionError, OverflowError) as error:
                raise fields.wrong(name, f"a regular expression ({error})", one) from error
    if not is_number(config.lora_alpha * math.sqrt(config.r)):
        raise fields.wrong("lora_alpha", "a scale that float32 holds", shown(config.lora_alpha))
