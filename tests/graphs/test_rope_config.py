"""The ways to write rope fields: each gives what transformers computes from it, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import config_of, yarn
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimode.errors import CheckpointError
from trimode.graphs.config import parse_config
from trimode.graphs.decoder.rope import inverse_frequencies

FULL = ["full_attention", "full_attention"]
OLD = {
    key: value for key, value in yarn(type="yarn").items() if key not in ("rope_type", "rope_theta")
}


def without(rope: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key not in names}


SAME: dict[str, dict[str, Any]] = {
    "flat": {"rope_parameters": yarn()},
    "nested": {"rope_parameters": {"full_attention": yarn()}, "layer_types": FULL},
    "nested, a type that no layer has": {
        "rope_parameters": {"full_attention": yarn(), "sliding_attention": None},
        "layer_types": FULL,
    },
    "nested twice alike": {
        "rope_parameters": {"full_attention": yarn(), "sliding_attention": yarn()},
        "layer_types": FULL,
    },
    "nested, theta beside": {
        "rope_parameters": {"full_attention": without(yarn(), "rope_theta")},
        "layer_types": FULL,
        "rope_theta": 1e6,
    },
    "old": {"rope_parameters": None, "rope_scaling": OLD, "rope_theta": 1e6},
    "old and new": {"rope_scaling": OLD, "rope_theta": 1e6},
    "theta beside": {"rope_parameters": without(yarn(), "rope_theta"), "rope_theta": 1e6},
    "length beside": {
        "rope_parameters": without(yarn(), "original_max_position_embeddings"),
        "original_max_position_embeddings": 64,
    },
    "the whole length inside": {"rope_parameters": yarn(max_position_embeddings=1024)},
    "both names of the type": {"rope_parameters": yarn(type="yarn")},
    "nulls": {
        "rope_parameters": yarn(attention_factor=None, truncate=None, partial_rotary_factor=None)
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", SAME)
def test_each_form_is_read_as_transformers_reads_it(form: str) -> None:
    values = config_of(**SAME[form])
    ours = parse_config(values)
    assert ours.rope == parse_config(config_of()).rope
    theirs = Ministral3Config(
        **copy.deepcopy(
            {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
        )
    )
    layer_type = "full_attention" if "full_attention" in theirs.rope_parameters else None
    # transformers rounds no ramp where truncate is null, and knows of no theta beside nested
    # fields.
    if form not in ("nulls", "nested, theta beside"):
        inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](
            theirs, torch.device("cpu"), layer_type=layer_type
        )
        np.testing.assert_array_max_ulp(
            inverse_frequencies(ours.rope, 16), inv_freq.numpy(), maxulp=2
        )


def test_nested_without_layer_types_means_every_layer() -> None:
    nested = parse_config(config_of(rope_parameters={"full_attention": yarn(factor=4.0)}))
    assert nested == parse_config(config_of(rope_parameters=yarn(factor=4.0)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "types that differ": (
        {"rope_parameters": {"full_attention": yarn(), "sliding_attention": yarn(factor=2.0)}},
        "sliding_attention",
    ),
    "another type alone": ({"rope_parameters": {"sliding_attention": yarn()}}, "full_attention"),
    "no rotation": ({"rope_parameters": {"full_attention": None}}, "full_attention"),
    "fields beside nested ones": (
        {"rope_parameters": {"full_attention": yarn(), "factor": 2.0}},
        "factor",
    ),
    "an unknown field": ({"rope_parameters": yarn(gamma=2)}, "gamma"),
    "an unknown nested field": ({"rope_parameters": {"full_attention": yarn(gamma=2)}}, "gamma"),
    "two thetas": ({"rope_theta": 1e4}, "rope_theta"),
    "two lengths": ({"original_max_position_embeddings": 32}, "original_max_position_embeddings"),
    "half a head beside": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "old and new that differ": ({"rope_scaling": {**OLD, "factor": 8.0}}, "factor of rope_scaling"),
    "old that says more": (
        {"rope_scaling": {**OLD, "attention_factor": 2.0}},
        "attention_factor of rope_scaling",
    ),
    "two types": ({"rope_parameters": yarn(type="default")}, "type"),
    "no type, with a factor": ({"rope_parameters": without(yarn(), "rope_type")}, "factor"),
    "a list": ({"rope_parameters": [yarn()]}, "rope_parameters"),
    "an empty list": ({"rope_parameters": []}, "rope_parameters"),
    "a type that is a list": ({"rope_parameters": yarn(rope_type=["yarn"])}, "rope_type"),
    "theta of 1": ({"rope_parameters": yarn(rope_theta=1)}, "rope_theta"),
    "theta without end": ({"rope_parameters": yarn(rope_theta=float("inf"))}, "rope_theta"),
    "theta of too many digits": ({"rope_parameters": yarn(rope_theta=10**400)}, "rope_theta"),
    "theta that is true": ({"rope_parameters": yarn(rope_theta=True)}, "rope_theta"),
    "factor of 0": ({"rope_parameters": yarn(factor=0)}, "factor"),
    "factor beyond float32": ({"rope_parameters": yarn(factor=1e-40)}, "factor"),
    "beta_fast below 0": ({"rope_parameters": yarn(beta_fast=-1)}, "beta_fast"),
    "beta_slow of 0": ({"rope_parameters": yarn(beta_slow=0)}, "beta_slow"),
    "betas the other way": ({"rope_parameters": yarn(beta_fast=1, beta_slow=32)}, "beta_slow"),
    "mscale below 0": ({"rope_parameters": yarn(mscale_all_dim=-4)}, "mscale_all_dim"),
    "attention_factor of 0": ({"rope_parameters": yarn(attention_factor=0)}, "attention_factor"),
    "truncate of 1": ({"rope_parameters": yarn(truncate=1)}, "truncate"),
    "a length of 64.0": (
        {"rope_parameters": yarn(original_max_position_embeddings=64.0)},
        "original_max_position_embeddings",
    ),
    "a sliding layer": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"layer_types\[1\]",
    ),
    "too few layers": ({"layer_types": ["full_attention"]}, "layer_types"),
    "layer types as text": ({"layer_types": "full_attention"}, "layer_types"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_would_be_read_otherwise_is_refused(form: str) -> None:
    changes, expected = REFUSED[form]
    with pytest.raises(CheckpointError, match=expected) as raised:
        parse_config(config_of(**changes))
    assert raised.value.hint
    assert "\n" not in raised.value.message
