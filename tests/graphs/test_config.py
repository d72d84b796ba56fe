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
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, config.head_dim) == (
        34,
        4096,
        131072,
        128,
    )
    assert config.eos_token_ids == (2,)


def test_old_style_rope_scaling() -> None:
    values = config_of(
        rope_theta=1e9,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    )
    del values["rope_parameters"]
    rope = parse_config(values).rope
    assert (rope.rope_type, rope.theta, rope.factor, rope.query_scale_beta) == (
        "yarn",
        1e9,
        4.0,
        None,
    )


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
        ({"eos_token_id": [11, True]}, "eos_token_id"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"bos_token_id": 109}, "bos_token_id"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"hidden_size": 48.0}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": None}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"architectures": "NemotronLabsDiffusionModel"}, "architectures"),
        ({"architectures": [7]}, "architectures"),
        ({"architectures": {}}, "architectures"),
        ({"architectures": ["NemotronLabsDiffusionVLMModel"]}, "NemotronLabsDiffusionVLMModel"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": ["nemotron_labs_diffusion"]}, "model_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"dlm_paradigm": "autoregressive"}, "dlm_paradigm"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
    ],
)
def test_what_would_change_the_model_is_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(CheckpointError, match=names) as raised:
        parse_config(config_of(**changes))
    assert raised.value.hint
    assert "\n" not in raised.value.message


def test_end_tokens_may_be_in_generation_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(config_of(eos_token_id=None, bos_token_id=None))
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [11]}')
    config = load_config(tmp_path)
    assert (config.eos_token_ids, config.bos_token_id) == ((11,), None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(CheckpointError, match=r"config\.json: expected eos_token_id") as raised:
        load_config(tmp_path)
    assert "generation_config.json" in raised.value.hint


@pytest.mark.parametrize("ids", [[], [-1], "11", [11.0], 109, True, 10**30])
def test_wrong_end_tokens_of_generation_config(tmp_path: Path, ids: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected eos_token_id"):
        load_config(tmp_path)


def test_what_lies_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(
        CheckpointError,
        match=r"generation_config\.json: expected a file, found a link to a file that is not there",
    ):
        load_config(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: expected a JSON file.*directory"
    ):
        load_config(tmp_path)


UNREADABLE = [
    "",
    "[]",
    "{",
    "\xff",
    '{"a": NaN}',
    '{"a": 1, "a": 2}',
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"a": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)
