"""The tables of keys against the libraries that write the files, and each entry against what is
read.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_of, write_checkpoint, yarn
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import GenerationConfig, Ministral3Config
from transformers.modeling_rope_utils import RopeParameters

from trimode.errors import CheckpointError
from trimode.formats.json_fields import Key, KeyTable
from trimode.graphs.adapter_config import read_adapter_config
from trimode.graphs.adapter_keys import ADAPTER_KEYS
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.config import ModelConfig, load_config, parse_config
from trimode.graphs.config_keys import CONFIG_KEYS, GENERATION_KEYS, ROPE_KEYS

TABLES: dict[str, KeyTable] = {
    "config": CONFIG_KEYS,
    "generation": GENERATION_KEYS,
    "rope": ROPE_KEYS,
    "adapter": ADAPTER_KEYS,
}
ADAPTER = {"peft_type": "LORA", "target_modules": ["o_proj"], "r": 4, "lora_alpha": 8}


def test_every_key_of_transformers_config_is_decided() -> None:
    fields = {field.name for field in dataclasses.fields(Ministral3Config)} | set(
        Ministral3Config().to_dict()
    )
    properties = {
        name
        for cls in Ministral3Config.__mro__
        for name, value in vars(cls).items()
        if isinstance(value, property) and value.fset
    }
    # Switches of the Python object, which are never written.
    properties -= {
        "_attn_implementation",
        "_experts_implementation",
        "allow_global_per_layer_attribute_access",
    }
    properties -= {"serialize_explicit_per_layer_config", "use_return_dict", "rope_scaling"}
    assert fields | properties <= set(CONFIG_KEYS)


PUBLISHED: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "auto_map": {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    },
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 262144,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"type": "yarn", **yarn(original_max_position_embeddings=16384)},
    "rope_theta": 1e6,
    "rope_scaling": yarn(original_max_position_embeddings=16384),
    "bos_token_id": 1,
    "eos_token_id": 11,
    "pad_token_id": None,
    "mask_token_id": 100,
    "block_size": 32,
    "dlm_paradigm": "bidirectional",
    "dlm_loss_weight": None,
    "ar_loss_weight": 1.0,
    "dp_varying_mask_ratio": False,
    "attn_implementation": "sdpa",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "transformers_version": "5.0.0",
    "initializer_range": 0.02,
}


def test_the_published_config_opens() -> None:
    config = parse_config(PUBLISHED)
    assert (
        config.num_hidden_layers,
        config.eos_token_ids,
        config.rope.factor,
        config.rope.theta,
    ) == (34, (11,), 16.0, 1e6)


def test_every_rope_parameter_of_transformers_is_decided() -> None:
    assert set(RopeParameters.__annotations__) | {"type"} <= set(ROPE_KEYS)
    assert set(Ministral3Config().rope_parameters) <= set(ROPE_KEYS)
    stale = (
        set(ROPE_KEYS)
        - set(RopeParameters.__annotations__)
        - set(Ministral3Config().rope_parameters)
        - {"type"}
    )
    assert not stale


def test_every_generation_key_of_transformers_is_decided() -> None:
    written = set(GenerationConfig().to_dict())
    assert written <= set(GENERATION_KEYS)
    assert set(GENERATION_KEYS) - written == {"_commit_hash"}


def test_every_field_of_peft_is_decided() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == set(ADAPTER_KEYS)


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_has_a_reason(table: str) -> None:
    for name, key in TABLES[table].items():
        assert key.reason, name
        assert key.kind == "only" or not key.allowed


def test_what_transformers_writes_by_default_opens(tmp_path: Path) -> None:
    written = Ministral3Config(
        **{k: v for k, v in config_of().items() if k not in ("architectures", "model_type")}
    ).to_dict()
    written.update(
        architectures=["NemotronLabsDiffusionModel"], model_type="nemotron_labs_diffusion"
    )
    config = parse_config(json.loads(json.dumps(written)))
    assert config == parse_config(config_of())
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    GenerationConfig(
        eos_token_id=[11, 2], do_sample=True, temperature=0.6, top_p=0.95
    ).save_pretrained(tmp_path)
    assert load_config(tmp_path).eos_token_ids == (11, 2)
    defaults = GenerationConfig._get_default_generation_params()
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    (tmp_path / "config.json").write_text(json.dumps({**defaults, **config_of()}))
    assert load_config(tmp_path) == config


def test_what_peft_writes_by_default_opens(tmp_path: Path) -> None:
    LoraConfig(target_modules=["o_proj"], r=4, lora_alpha=8, task_type="CAUSAL_LM").save_pretrained(
        tmp_path
    )
    config = read_adapter_config(tmp_path / "adapter_config.json")
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8.0, ("o_proj",))


# A value that no neutral key minds, and no other key has for its own.
ODD: tuple[Any, ...] = ("odd", 7.25, -3, True, [7], {"odd": 1}, [])


def test_refused_values_are_named(tmp_path: Path) -> None:
    for name, key in CONFIG_KEYS.items():
        for value in _refused(key):
            with pytest.raises(CheckpointError, match=name):
                parse_config({**config_of(), name: value})
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    for name, key in GENERATION_KEYS.items():
        for value in _refused(key):
            (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
            with pytest.raises(CheckpointError, match=name) as raised:
                load_config(tmp_path)
            assert "generation_config.json" in raised.value.message
            assert raised.value.hint
    for name, key in ROPE_KEYS.items():
        for value in _refused(key):
            with pytest.raises(CheckpointError, match=name):
                parse_config(config_of(rope_parameters=yarn(**{name: value})))
    for name, key in ADAPTER_KEYS.items():
        for value in _refused(key):
            with pytest.raises(CheckpointError, match=name):
                _read_adapter(tmp_path, {name: value})


def test_allowed_and_neutral_values_change_nothing(tmp_path: Path) -> None:
    plain = parse_config(config_of())
    for name, key in CONFIG_KEYS.items():
        for value in _accepted(key):
            assert parse_config({**config_of(), name: value}) == plain, name
    for name, key in GENERATION_KEYS.items():
        for value in _accepted(key):
            assert parse_config(config_of(), generation={name: value}) == plain, name
    for name, key in ROPE_KEYS.items():
        for value in _accepted(key):
            assert parse_config(config_of(rope_parameters=yarn(**{name: value}))) == plain, name
    adapter = _read_adapter(tmp_path, {})
    for name, key in ADAPTER_KEYS.items():
        for value in _accepted(key):
            assert _read_adapter(tmp_path, {name: value}) == adapter, name


UNDERSTOOD = sorted(name for name, key in CONFIG_KEYS.items() if key.kind == "understood")
UNDERSTOOD_ROPE = sorted(name for name, key in ROPE_KEYS.items() if key.kind == "understood")
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(UNDERSTOOD), value=ANY_JSON)
def test_a_changed_field_changes_the_model_or_is_refused(name: str, value: Any) -> None:
    before = config_of(
        rope_theta=1e6,
        partial_rotary_factor=1.0,
        original_max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
    )
    _changes_or_is_refused(before, {**before, name: value}, name, value, before.get(name))


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(UNDERSTOOD_ROPE), value=ANY_JSON)
def test_a_changed_rope_field_changes_the_model_or_is_refused(name: str, value: Any) -> None:
    rope = yarn(type="yarn", attention_factor=1.0, truncate=True)
    _changes_or_is_refused(
        config_of(rope_parameters=rope),
        config_of(rope_parameters={**rope, name: value}),
        name,
        value,
        rope[name],
    )


@settings(max_examples=200, deadline=None)
@given(name=st.text(min_size=1, max_size=12), value=ANY_JSON)
def test_an_unknown_key_is_refused_unless_it_is_null(name: str, value: Any) -> None:
    if name in CONFIG_KEYS:
        return
    values = config_of(**{name: value})
    if value is None:
        assert parse_config(values) == parse_config(config_of())
        return
    with pytest.raises(CheckpointError, match="keys that trimode knows") as raised:
        parse_config(values)
    assert "\n" not in raised.value.message


def test_an_unknown_key_is_named_in_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", config_of(), rank=4)
    for file, place in (
        ("config.json", None),
        ("config.json", "rope_parameters"),
        ("linear_spec_lora/adapter_config.json", None),
    ):
        text = (folder / file).read_text()
        values = json.loads(text)
        (values if place is None else values[place])["qk_clip"] = 3
        (folder / file).write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=rf"{file}.*qk_clip"):
            open_checkpoint(folder)
        (folder / file).write_text(text)
    (folder / "generation_config.json").write_text('{"logit_cap": 30}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*logit_cap"):
        open_checkpoint(folder)


def _changes_or_is_refused(
    before: Mapping[str, Any], after: Mapping[str, Any], name: str, value: Any, old: Any
) -> None:
    changed = _parsed(after)
    if changed is None:
        return
    # Null is an absent key: its default may be the value that was there. Names of the model are the
    # model's alone.
    if value is not None and name not in ("architectures", "model_type", "layer_types"):
        assert (changed == parse_config(before)) == _is_equal(value, old)


def _parsed(values: Mapping[str, Any]) -> ModelConfig | None:
    """The model, or None where the values are refused."""
    try:
        return parse_config(values)
    except CheckpointError:
        return None


def _is_equal(value: Any, old: Any) -> bool:
    """Whether two values say the same: a null inside of an object is an absent key, too."""
    if isinstance(value, dict):
        value = {key: one for key, one in value.items() if one is not None}
    return value in (old, [old]) or (value == {} and old is None)


def _refused(key: Key) -> list[Any]:
    if key.kind != "only":
        return []
    return [
        one
        for one in ODD
        if not any(one == allowed and type(one) is type(allowed) for allowed in key.allowed)
    ]


def _accepted(key: Key) -> list[Any]:
    if key.kind == "understood":
        return []
    return [None, *(ODD if key.kind == "neutral" else key.allowed)]


def _read_adapter(folder: Path, changes: Mapping[str, Any]) -> object:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**ADAPTER, **changes}))
    with warnings.catch_warnings():
        return read_adapter_config(path)
