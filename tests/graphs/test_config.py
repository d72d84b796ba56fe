from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_of, yarn

from trimode.errors import CheckpointError
from trimode.graphs.config import load_config, parse_config


def test_fields_are_read_literally() -> None:
    config = parse_config(config_of(rope_parameters=yarn(factor=0.25, rope_theta=1e9)))
    assert (config.query_size, config.hidden_size, config.key_value_size) == (96, 48, 48)
    assert (config.rope.factor, config.rope.theta, config.rope.query_scale_beta) == (0.25, 1e9, 0.1)
    assert (config.mask_token_id, config.eos_token_ids) == (100, (11,))


def test_missing_fields_take_the_family_defaults() -> None:
    config = parse_config({"architectures": ["NemotronLabsDiffusionModel"], "mask_token_id": 100})
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, config.head_dim) == (34, 4096, 131072, 128)
    assert config.eos_token_ids == (2,)


def test_old_style_rope_scaling() -> None:
    values = config_of(rope_theta=1e9, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    del values["rope_parameters"]
    rope = parse_config(values).rope
    assert (rope.rope_type, rope.theta, rope.factor, rope.query_scale_beta) == ("yarn", 1e9, 4.0, None)


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 2]}))
    assert load_config(tmp_path).eos_token_ids == (11, 2)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"rope_parameters": yarn(rope_type="longrope")}, "longrope"),
        ({"rope_parameters": yarn(partial_rotary_factor=0.5)}, "partial_rotary_factor"),
        ({"rope_parameters": yarn(factor=None)}, "factor"),
        ({"rope_parameters": yarn(factor=-1.0)}, "factor"),
        ({"rope_parameters": "yarn"}, "rope_parameters"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"mask_token_id": 109}, "mask_token_id"),
        ({"eos_token_id": 5000}, "eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id"),
    ],
)
def test_what_would_change_the_model_is_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(CheckpointError, match=names) as raised:
        parse_config(config_of(**changes))
    assert raised.value.hint
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_unreadable_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)
