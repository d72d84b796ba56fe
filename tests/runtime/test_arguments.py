"""Values of the wrong type get a UsageError that names the argument, in every method that takes
it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Built

from trimode.errors import UsageError
from trimode.runtime.decode.options import KINDS, DecodeOptions, make_options
from trimode.runtime.decode.sampling import SamplingOptions
from trimode.runtime.model import TriModeModel

INF, NAN = float("inf"), float("nan")
NOT_WHOLE: tuple[Any, ...] = (
    "4",
    4.0,
    4.5,
    True,
    NAN,
    [4],
    {},
    np.float32(4),
    np.bool_(True),
    np.array([4]),
    b"4",
    4j,
)
NOT_NUMBER: tuple[Any, ...] = (
    "0.5",
    True,
    NAN,
    INF,
    -INF,
    [0.5],
    {},
    np.float64(NAN),
    np.array([0.5]),
    10**400,
    1j,
)
NOT_FLAG: tuple[Any, ...] = (0, 1, "yes", 1.0, [], np.int64(1))
NOT_TEXT: tuple[Any, ...] = (1, b"margin", ["margin"], True)
NOT_TEXTS: tuple[Any, ...] = (
    1,
    b"a",
    [1],
    ["a", None],
    {"a": 1},
    1.5,
    True,
    [b"a"],
    np.array([1, 2]),
)
NOT_TOKENS: tuple[Any, ...] = (
    "11",
    11.0,
    True,
    [1.5],
    ["11"],
    [True],
    {"a": 1},
    np.array([1.5]),
    np.array([[1]]),
    [[1]],
    [None],
    b"\x0b",
    INF,
)
NOT_BIASES: tuple[Any, ...] = (
    1,
    "11=2",
    [(11, 2.0)],
    {11: "2"},
    {11: NAN},
    {11: True},
    {"11": 2.0},
    {1.5: 2.0},
    {True: 2.0},
    {None: 2.0},
    (11, 2.0),
    ((11, 2.0, 3.0),),
    {11},
)
NOT_PATH: tuple[Any, ...] = (1, b"x", ["x"], True)

WRONG: dict[str, tuple[tuple[Any, ...], bool]] = {
    "max_new_tokens": (NOT_WHOLE, False),
    "block_length": (NOT_WHOLE, False),
    "threshold": (NOT_NUMBER, False),
    "use_drafter": (NOT_FLAG, False),
    "eos_token_ids": (NOT_TOKENS, True),
    "min_new_tokens": (NOT_WHOLE, False),
    "stop": (NOT_TEXTS, True),
    "max_thinking_tokens": (NOT_WHOLE, True),
    "end_think_token_id": (NOT_WHOLE, True),
    "logprobs": (NOT_WHOLE, True),
    "costs": ((1, "fast", {}), True),
    "sampler": (NOT_TEXT, False),
    "steps": (NOT_WHOLE, True),
    "scorer": ((1, "learned"), True),
    "temperature": (NOT_NUMBER, False),
    "top_k": (NOT_WHOLE, False),
    "top_p": (NOT_NUMBER, False),
    "min_p": (NOT_NUMBER, False),
    "repetition_penalty": (NOT_NUMBER, False),
    "presence_penalty": (NOT_NUMBER, False),
    "frequency_penalty": (NOT_NUMBER, False),
    "logit_bias": (NOT_BIASES, True),
    "seed": (NOT_WHOLE, True),
    "structured_outputs": ((1, "json", [], True), True),
}
"""By option: values of the wrong type, and whether None is allowed."""
CHOICES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "min_new_tokens",
    "stop",
    "max_thinking_tokens",
    "end_think_token_id",
    "structured_outputs",
)
BLOCKS = ("max_new_tokens", "block_length")


@pytest.fixture
def model(built: Callable[[str], Built]) -> TriModeModel:
    return built("three_kv_heads").model


def methods(model: TriModeModel) -> dict[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    """Each with a prompt given, and the keywords of :data:`WRONG` that it takes."""
    every = tuple(KINDS)
    return {
        "ar_generate": (lambda **o: model.ar_generate([[20]], **o), ("max_new_tokens", *CHOICES)),
        "generate": (
            lambda **o: model.generate([[20]], **o),
            (*BLOCKS, "sampler", "steps", *CHOICES),
        ),
        "linear_spec_generate": (
            lambda **o: model.linear_spec_generate([[20]], **o),
            (*BLOCKS, "threshold", "use_drafter", *CHOICES),
        ),
        "self_spec_generate": (
            lambda **o: model.self_spec_generate([[20]], **o),
            (*BLOCKS, *CHOICES),
        ),
        "quadratic_spec_generate": (
            lambda **o: model.quadratic_spec_generate([[20]], **o),
            (*BLOCKS, *CHOICES),
        ),
        "auto_generate": (
            lambda **o: model.auto_generate([[20]], **o),
            (*BLOCKS, "use_drafter", *CHOICES),
        ),
        "stream": (lambda **o: model.stream([[20]], "ar", **o), every),
        "continue_sequence": (
            lambda **o: model.continue_sequence(model.new_sequence([[20]]), "diffusion", **o),
            every,
        ),
        "generate_batch": (
            lambda **o: model.generate_batch([[20], [30]], "ar", **o),
            tuple(set(every) - {"seed", "max_new_tokens"}),
        ),
        "add": (lambda **o: model.new_batch(1).add([20], "ar", **o), every),
        "resume": (
            lambda **o: (batch := model.new_batch(1)).resume(batch.add([20], "ar"), "ar", **o),
            every,
        ),
    }


def refused(call: Callable[[], object], name: str) -> UsageError:
    with pytest.raises(UsageError) as raised:
        call()
    message = raised.value.message
    assert message.startswith(f"{name}: expected "), message
    assert ", found " in message
    assert "\n" not in message
    assert raised.value.hint
    return raised.value


METHODS = (
    "ar_generate",
    "generate",
    "linear_spec_generate",
    "self_spec_generate",
    "quadratic_spec_generate",
    "auto_generate",
    "stream",
    "continue_sequence",
    "generate_batch",
    "add",
    "resume",
)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_every_method(model: TriModeModel, method: str) -> None:
    call, names = methods(model)[method]
    for name in names:
        values, none_is_fine = WRONG[name]
        for value in (*values, *(() if none_is_fine else (None,)), object()):
            refused(lambda call=call, name=name, value=value: call(**{name: value}), name)  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS[:6])
def test_end_tokens_are_named_as_the_method_names_them(model: TriModeModel, method: str) -> None:
    call, _ = methods(model)[method]
    for value in NOT_TOKENS:
        refused(lambda value=value: call(eos_token_id=value), "eos_token_id")  # type: ignore[misc]


def test_every_option_is_in_the_table() -> None:
    fields = {**DecodeOptions.__dataclass_fields__, **SamplingOptions.__dataclass_fields__}
    assert set(KINDS) == set(WRONG) == set(fields) - {"sampling"}
    for options in (DecodeOptions(), SamplingOptions()):
        make_options(**{name: value for name, value in vars(options).items() if name != "sampling"})


@pytest.mark.parametrize(
    ("method", "wrong", "near"),
    [
        ("ar_generate", "max_tokens", "max_new_tokens"),
        ("ar_generate", "eos_token_ids", "eos_token_id"),
        ("generate", "block_size", "block_length"),
        ("generate", "temprature", "temperature"),
        ("linear_spec_generate", "use_draft", "use_drafter"),
        ("stream", "eos_token_id", "eos_token_ids"),
        ("stream", "treshold", "threshold"),
        ("continue_sequence", "topk", "top_k"),
        ("generate_batch", "max_row", "max_rows"),
        ("self_spec_generate", "Seed", "seed"),
        ("auto_generate", "stops", "stop"),
        ("add", "sampling", "sampler"),
        ("resume", "step", "steps"),
    ],
)
def test_an_unknown_keyword_gets_the_nearest(
    model: TriModeModel, method: str, wrong: str, near: str
) -> None:
    call, _ = methods(model)[method]
    with pytest.raises(
        UsageError, match=f"{method}: expected a keyword that it takes, found {wrong}"
    ) as raised:
        call(**{wrong: 1})
    assert raised.value.hint == f"did you mean {near}?"


def test_keywords_of_the_other_methods(model: TriModeModel, built: Callable[[str], Built]) -> None:
    bundle = built("three_kv_heads").bundle
    for call, near in (
        (lambda: model.new_batch(rows=2), "max_rows"),  # type: ignore[call-arg]
        (lambda: model.new_sequence(id=[[1]]), "ids"),  # type: ignore[call-arg]
        (lambda: TriModeModel.from_pretrained(bundle, num_thread=1), "num_threads"),  # type: ignore[call-arg]
    ):
        with pytest.raises(UsageError, match="expected a keyword") as raised:
            call()
        assert near in raised.value.hint
    with pytest.raises(UsageError, match="it takes"):
        model.stream([[20]], "ar", qqqq=1)
    for call in (
        lambda: model.ar_generate(),
        lambda: model.new_sequence(),
        lambda: model.new_batch(1, 2),
        lambda: model.ar_generate([[1]], ids=1),
    ):  # type: ignore[call-arg, misc]
        with pytest.raises(UsageError, match="expected its arguments"):
            call()


def test_the_arguments_of_the_other_methods(
    model: TriModeModel, built: Callable[[str], Built], tmp_path: Path
) -> None:
    bundle = built("three_kv_heads").bundle
    for value in NOT_WHOLE:
        refused(lambda value=value: model.new_batch(value), "max_rows")  # type: ignore[misc]
        refused(lambda value=value: model.generate_batch([[20]], max_rows=value), "max_rows")  # type: ignore[misc]
        refused(
            lambda value=value: TriModeModel.from_pretrained(bundle, num_threads=value),
            "num_threads",
        )  # type: ignore[misc]
    for value in (*NOT_FLAG, None):
        refused(lambda value=value: TriModeModel.from_pretrained(bundle, verify=value), "verify")  # type: ignore[misc]
    for value in NOT_TEXT:
        for name in ("precision", "target"):
            refused(
                lambda name=name, value=value: TriModeModel.from_pretrained(
                    bundle, **{name: value}
                ),
                name,
            )  # type: ignore[misc]
    for value in NOT_PATH:
        for name in ("runtime_cache", "timings"):
            refused(
                lambda name=name, value=value: TriModeModel.from_pretrained(
                    bundle, **{name: value}
                ),
                name,
            )  # type: ignore[misc]
    for value in (*NOT_PATH, None):
        refused(lambda value=value: TriModeModel.from_pretrained(value), "path")  # type: ignore[misc]


def test_modes_sequences_and_prompts(model: TriModeModel) -> None:
    for value in (None, 1, ["ar"], {}):
        refused(lambda value=value: model.stream([[20]], value), "mode")  # type: ignore[misc]
        refused(lambda value=value: model.generate_batch([[20]], value), "mode")  # type: ignore[misc]
        refused(
            lambda value=value: model.continue_sequence(model.new_sequence([[20]]), value), "mode"
        )  # type: ignore[misc]
    for value in (None, [[20]], model):
        refused(lambda value=value: model.continue_sequence(value, "ar"), "sequence")  # type: ignore[misc]
    for value in (None, 1, "ab", {"a": [1]}, 1.5):
        refused(lambda value=value: model.generate_batch(value), "prompts")  # type: ignore[misc]


WRONG_IDS: tuple[Any, ...] = (
    None,
    1,
    "20",
    [["20"]],
    [[20.0]],
    [[NAN]],
    [[True]],
    [[20, True]],
    [(20, False)],
    ([20, 30, np.bool_(True)],),
    [[None]],
    [],
    [[]],
    [20],
    [[[20]]],
    [[20], [30]],
    [[20], [30, 40]],
    [[-1]],
    [[109]],
    [[2**70]],
    {"ids": [1]},
    {20},
    np.array([[20.0]]),
    np.array([20]),
    np.array([["20"]]),
    np.zeros((1, 0), np.int64),
    torch.tensor([20]),
    torch.tensor([[20.0]]),
    torch.tensor([[20.0]], requires_grad=True),
    torch.tensor([[1.0]], dtype=torch.bfloat16),
    np.array([[2**63]], np.uint64),
    torch.tensor([[True]]),
    b"20",
)


@pytest.mark.parametrize(
    "method",
    [
        "new_sequence",
        "stream",
        "ar_generate",
        "generate",
        "linear_spec_generate",
        "self_spec_generate",
    ],
)
def test_token_ids(model: TriModeModel, method: str) -> None:
    for ids in WRONG_IDS:
        with pytest.raises(UsageError, match="token") as raised:
            getattr(model, method)(ids)
        assert raised.value.hint
        if isinstance(ids, list) and len(ids) == 1:
            with pytest.raises(UsageError):
                model.generate_batch([[20], ids[0]])
            with pytest.raises(UsageError):
                model.new_batch(1).add(ids[0])


def test_numbers_of_numpy_and_ids_of_torch_are_fine(model: TriModeModel) -> None:
    plain: dict[str, Any] = {
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_k": 5,
        "seed": 3,
        "eos_token_ids": (11,),
        "logprobs": 1,
    }
    numpy: dict[str, Any] = {
        "max_new_tokens": np.int32(6),
        "temperature": np.float32(1),
        "top_k": np.uint8(5),
        "seed": np.int64(3),
        "eos_token_ids": np.array([11]),
        "logprobs": np.int16(1),
    }
    expected = model.stream([[20, 30]], "linear_spec", **plain).finish()
    for ids in (
        np.array([[20, 30]], np.int16),
        torch.tensor([[20, 30]]),
        ((20, 30),),
        np.array([[20, 30]], np.uint64),
    ):
        found = model.stream(ids, "linear_spec", use_drafter=np.bool_(True), **numpy).finish()
        assert (found.token_ids, found.seed) == (expected.token_ids, 3)
        assert type(found.seed) is int
    for ends in (11, np.int64(11), [11], {11}, (11,)):
        assert (
            model.ar_generate([[20]], eos_token_id=ends)[0].shape
            == model.ar_generate([[20]], eos_token_id=11)[0].shape
        )  # type: ignore[arg-type]
    batch = model.generate_batch(
        np.array([[20, 30], [20, 30]]), "linear_spec", **{**numpy, "seed": np.array([3, 4])}
    )
    assert batch[0].token_ids == expected.token_ids
    assert [one.seed for one in batch] == [3, 4]
    assert len(model.generate_batch((row for row in ([20], [30])), "ar", max_new_tokens=2)) == 2
    assert model.generate([[20]], threshold=None, max_new_tokens=np.int64(2), stop=None)[
        0
    ].shape == (1, 3)
    assert model.new_batch(np.int64(2)).num_free == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", [[1], [2]]),
        ("seed", "ab"),
        ("max_new_tokens", ["1", "2"]),
        ("seed", [1.5, 2]),
        ("seed", -1),
        ("max_new_tokens", [True, 2]),
        ("max_new_tokens", None),
    ],
)
def test_options_with_one_entry_a_prompt(model: TriModeModel, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as raised:
        model.generate_batch([[20], [30]], "ar", **{name: value})
    assert raised.value.hint
