from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import config_of, yarn
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from trimode.graphs.config import parse_config
from trimode.graphs.decoder.rope import attention_factor, inverse_frequencies, rope_tables

ROPES = [
    yarn(),
    yarn(rope_theta=1e9),
    yarn(factor=0.25, original_max_position_embeddings=16384),
    yarn(original_max_position_embeddings=16384),
    yarn(mscale=None, mscale_all_dim=None),
    yarn(mscale=0.7, mscale_all_dim=1.3),
    yarn(attention_factor=1.75),
    yarn(truncate=False, beta_fast=8.0, beta_slow=2.0),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_frequencies_equal_transformers(rope: dict[str, Any], head_dim: int) -> None:
    theirs = Ministral3Config(
        head_dim=head_dim, rope_parameters=dict(rope), max_position_embeddings=262144
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    ours = parse_config(config_of(rope_parameters=rope, head_dim=head_dim)).rope
    # Two implementations of a float32 power: units in the last place are all that may differ.
    np.testing.assert_array_max_ulp(inverse_frequencies(ours, head_dim), inv_freq.numpy(), maxulp=2)
    assert attention_factor(ours) == pytest.approx(factor, rel=1e-12)


def test_published_ramps() -> None:
    """Theta 1e6: pairs below 20 are plain, above 37 divided by 16; theta 1e9: 13 and 25; factor
    0.25 multiplies by 4.
    """
    for theta, low, high in ((1e6, 20, 37), (1e9, 13, 25)):
        plain = theta ** -(np.arange(64) / 64)
        for factor in (16.0, 0.25):
            rope = parse_config(
                config_of(
                    rope_parameters=yarn(
                        rope_theta=theta, factor=factor, original_max_position_embeddings=16384
                    )
                )
            ).rope
            ratio = inverse_frequencies(rope, 128) / plain
            np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-5)
            np.testing.assert_allclose(ratio[high:], 1 / factor, rtol=1e-5)
            assert abs(ratio[low + 1] - 1) > 1e-3


def test_tables_at_long_positions() -> None:
    config = parse_config(config_of(rope_parameters=yarn(original_max_position_embeddings=16384)))
    tables = rope_tables(config.rope, 128, 40000)
    angles = np.arange(40000, dtype=np.float64)[:, None] * inverse_frequencies(
        config.rope, 128
    ).astype(np.float64)
    # float32 angles near 40000 are exact to 2e-3 rad: that is the reference's arithmetic, not ours
    # to improve.
    np.testing.assert_allclose(tables.cos, np.cos(angles), atol=2.5e-3)
    np.testing.assert_allclose(tables.sin[:200], np.sin(angles[:200]), atol=1e-5)


def test_query_scale() -> None:
    config = parse_config(config_of())
    scale = rope_tables(config.rope, 16, 700).query_scale
    assert scale is not None
    assert (scale[:64] == 1).all()
    theirs = get_llama_4_attn_scale(torch.arange(700)[None], 0.1, 64)[0, 0, :, 0]
    np.testing.assert_allclose(scale, theirs.numpy(), rtol=1e-6)
    assert scale[64] == pytest.approx(1 + 0.1 * np.log(2))


def test_no_query_scale_without_beta() -> None:
    assert (
        rope_tables(
            parse_config(config_of(rope_parameters=yarn(llama_4_scaling_beta=0.0))).rope, 16, 10
        ).query_scale
        is None
    )
