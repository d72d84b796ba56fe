"""A trace against the text it is of, and each line of it against a second look at the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Built
from typer.testing import CliRunner

from trimode.cli.main import app
from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.formats.trace import ForwardRecord, Trace, TracedRun, read_trace
from trimode.runtime import TriModeModel
from trimode.runtime.auto.policy import StepCosts
from trimode.runtime.decode.stream import Generation
from trimode.runtime.measure.trace import TraceWriter, codec_of, header_of
from trimode.runtime.service import Engine

MODES: tuple[Mode, ...] = ("ar", "diffusion", "linear_spec", "auto")
PROMPTS = ("Add 478 and 356.", "JSON: Clara is 47 and lives in Kyoto.", "Sort 45 23 11.")
MASK = 100


@pytest.fixture(scope="module")
def model(demo: Path) -> Iterator[TriModeModel]:
    with TriModeModel.from_pretrained(demo, num_threads=1) as opened:
        yield opened


class Traces:
    """The lines of a trace, as a file and as it is read."""

    def __init__(self, model: TriModeModel, path: Path) -> None:
        self.lines: list[str] = []
        self.path = path
        header = header_of(model.bundle.manifest, model.bundle.precision, model.target)
        self.writer = TraceWriter(
            header, codec_of(model), lambda record: self.lines.append(record.line())
        )

    def read(self) -> Trace:
        self.path.write_text("".join(f"{line}\n" for line in self.lines), encoding="utf-8")
        return read_trace(self.path)


def traced(
    model: TriModeModel, ids: list[int], mode: Mode, path: Path, **options: Any
) -> tuple[TracedRun, Generation]:
    traces = Traces(model, path)
    stream = model.stream([ids], mode, **options)
    stream.observer = run = traces.writer.begin(mode, ids, stream.options)
    result = stream.finish()
    run.end(result)
    return traces.read().runs[0], result


def chat(model: TriModeModel, text: str) -> list[int]:
    return model.codec.encode_chat([{"role": "user", "content": text}])


def counts_of(run: TracedRun) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for forward in run.forwards:
        counts[forward.phase] += forward.num_parts
    return dict(counts)


def check_counts(run: TracedRun, result: Generation) -> None:
    assert run.token_ids == result.token_ids
    assert counts_of(run) == {name: n for name, n in vars(result.forwards).items() if n}
    assert [step.nfe for step in run.forwards] == sorted(step.nfe for step in run.forwards)
    assert run.forwards[-1].nfe == result.nfe
    end = run.end
    assert end is not None
    assert (end.num_tokens, end.nfe, end.forwards, end.finish_reason) == (
        len(result.token_ids),
        result.nfe,
        counts_of(run),
        result.finish_reason,
    )
    assert (end.acceptance_length, end.tokens_per_forward, end.seed) == (
        result.acceptance_length,
        result.tokens_per_forward,
        result.seed,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 19},
        {"temperature": 0.9, "seed": 5, "max_new_tokens": 40},
        {"stop": "1", "min_new_tokens": 3},
        {"repetition_penalty": 1.3, "logprobs": 1, "max_new_tokens": 24, "block_length": 8},
    ],
)
def test_tokens_text_and_counts_are_the_generations(
    model: TriModeModel, tmp_path: Path, mode: Mode, options: dict[str, Any]
) -> None:
    for prompt in PROMPTS:
        ids = chat(model, prompt)
        run, result = traced(model, ids, mode, tmp_path / "t", **options)
        check_counts(run, result)
        assert list(run.start.prompt_ids) == ids
        again = model.stream([ids], mode, **options)
        assert run.text == "".join(again.text())
        times = [step.end_ms for step in run.steps]
        assert times == sorted(times)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear_spec", "quadratic_spec"])
@pytest.mark.parametrize("length", [1, 7, 150])
def test_random_models_without_a_tokenizer(
    quadratic: Callable[[str], Built], tmp_path: Path, mode: Mode, length: int
) -> None:
    """Prompts from the seed hold the mask's own id, too."""
    model = quadratic("three_kv_heads").model
    ids = np.random.default_rng(length).integers(0, 109, length).tolist()
    run, result = traced(
        model, [*ids, MASK, 5], mode, tmp_path / "t", max_new_tokens=21, block_length=6
    )
    check_counts(run, result)
    assert run.text is None


def replay(run: TracedRun) -> list[int]:
    """Tokens by what the positions and drafts say alone, without ``committed``."""
    text = list(run.start.prompt_ids)
    held: dict[int, int] = {}
    for step in run.forwards:
        begin = step.past_length + 1
        assert (
            list(step.input_ids[: len(text) - step.past_length])
            == text[step.past_length :][: len(step.input_ids)]
        )
        if MASK not in step.input_ids[:1]:  # the first of a block is known before it
            held[step.past_length] = step.input_ids[0]
        for one in step.positions:
            if one.token_id is not None:
                held[one.position] = one.token_id
        for index, token in enumerate(step.drafted[: step.accepted]):
            assert held[begin + index] == token
        while len(text) < len(run.start.prompt_ids) + len(
            [t for s in run.forwards[: run.forwards.index(step) + 1] for t in s.committed]
        ):
            text.append(held[len(text)])
    return text[len(run.start.prompt_ids) :]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [None, 0.97])
def test_positions_alone_give_the_text(
    model: TriModeModel, tmp_path: Path, mode: Mode, threshold: float | None
) -> None:
    options = {} if threshold is None or mode == "auto" else {"threshold": threshold}
    for prompt in PROMPTS:
        run, result = traced(model, chat(model, prompt), mode, tmp_path / "t", **options)
        assert replay(run) == result.token_ids


def test_quadratic_positions_give_the_text(
    quadratic: Callable[[str], Built], tmp_path: Path
) -> None:
    model = quadratic("three_kv_heads").model
    run, result = traced(
        model, list(range(12, 30)), "quadratic_spec", tmp_path / "t", max_new_tokens=30
    )
    assert replay(run) == result.token_ids


def test_denoise_and_draft_are_what_the_graph_says(model: TriModeModel, tmp_path: Path) -> None:
    """Each block is shown to the graph again, in a cache of its own."""
    for mode in ("diffusion", "linear_spec"):
        run, result = traced(model, chat(model, PROMPTS[0]), mode, tmp_path / "t")
        whole = [*run.start.prompt_ids, *result.token_ids]
        scale = 0.0 if mode == "diffusion" else 1.0
        blocks = [step for step in run.forwards if step.graph == "draft"]
        assert blocks
        for step in blocks:
            ids, probabilities = second_look(model, whole[: step.past_length], step, scale)
            masked = [i for i, token in enumerate(step.input_ids) if token == MASK]
            assert [one.position - step.past_length for one in step.positions] == masked
            for one, slot in zip(step.positions, masked, strict=True):
                assert [c.token_id for c in one.top] == ids[slot].tolist()
                np.testing.assert_allclose(
                    [c.probability for c in one.top], probabilities[slot], atol=1e-4
                )
                if one.token_id is not None:
                    assert one.confidence == one.top[0].probability
                filled = one.token_id is not None
                assert filled or max(c.probability for c in one.top) < 0.9 or mode != "diffusion"


def second_look(
    model: TriModeModel, before: list[int], step: ForwardRecord, scale: float
) -> tuple[Any, Any]:
    session = model.session
    cache = session.new_cache()
    cache.reserve(len(before) + len(step.input_ids))
    session.run("ar", cache, np.array([before]), 0)
    ids, probabilities = session.run("draft", cache, np.array([step.input_ids]), len(before), scale)
    return ids[0].copy(), probabilities[0].copy()


def test_accepted_and_rejected_are_counted_by_cycle(model: TriModeModel, tmp_path: Path) -> None:
    for prompt in (*PROMPTS, "Say nothing sensible at all 12 34!"):
        run, result = traced(
            model, chat(model, prompt), "linear_spec", tmp_path / "t", max_new_tokens=60
        )
        cycles = [step for step in run.forwards if step.phase == "verify"]
        for step in cycles:
            assert step.accepted + step.rejected <= len(step.drafted)
            assert len(step.committed) in (step.accepted, step.accepted + 1)
            if step.rejected:
                assert step.committed[-1] != step.drafted[step.accepted]
        assert 1 + sum(len(step.committed) for step in cycles) == len(result.token_ids)


def test_engine_rows_have_the_trace_of_a_single_run(model: TriModeModel, tmp_path: Path) -> None:
    with Engine(model, max_rows=4, by_load=False) as engine:
        asked = []
        for number, (mode, prompt) in enumerate((m, p) for m in MODES for p in PROMPTS):
            traces = Traces(model, tmp_path / str(number))
            ids = chat(model, prompt)
            handle = engine.submit(ids, mode=mode, trace=traces.writer, cache_salt=str(number))
            asked.append((mode, ids, traces, handle))
        for mode, ids, traces, handle in asked:
            result = handle.result(60)
            run = traces.read().runs[0]
            check_counts(run, result)
            alone, _ = traced(model, ids, mode, tmp_path / "alone")
            assert [decided(step) for step in run.forwards] == [
                decided(step) for step in alone.forwards
            ]


def decided(step: ForwardRecord) -> tuple[Any, ...]:
    filled = tuple((one.position, one.token_id) for one in step.positions)
    return step.phase, step.past_length, step.input_ids, filled, step.accepted, step.committed


def test_engine_trace_shows_a_known_prefix_and_parts(model: TriModeModel, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(12, 90, 300).tolist()
    with Engine(model, max_rows=2, latency_target_ms=0.01) as engine:
        other = engine.submit(list(range(12, 40)), mode="ar", max_new_tokens=200)
        first = Traces(model, tmp_path / "first")
        engine.submit(ids, mode="ar", max_new_tokens=8, trace=first.writer).result(60)
        second = Traces(model, tmp_path / "second")
        handle = engine.submit([*ids, 20], mode="ar", max_new_tokens=8, trace=second.writer)
        result = handle.result(60)
        other.cancel()
    run = second.read().runs[0]
    assert run.forwards[0].past_length == handle.usage.cached_tokens > 250
    check_counts(run, result)
    assert first.read().runs[0].forwards[0].num_parts > 1


def test_several_texts_of_a_request_are_runs(model: TriModeModel, tmp_path: Path) -> None:
    traces = Traces(model, tmp_path / "t")
    with Engine(model, max_rows=2) as engine:
        options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_new_tokens": 20, "n": 2}
        handle = engine.submit(
            chat(model, PROMPTS[0]), mode="linear_spec", trace=traces.writer, **options
        )
        results = [choice.result(60) for choice in handle.choices]
    runs = traces.read().runs
    for number, result in enumerate(results):
        check_counts(runs[number], result)
    assert [run.end.seed for run in runs.values() if run.end] == [3, 4]


def test_a_cancelled_request_ends_with_its_error(model: TriModeModel, tmp_path: Path) -> None:
    traces = Traces(model, tmp_path / "t")
    with Engine(model, max_rows=1) as engine:
        endless: dict[str, Any] = {"max_new_tokens": 900, "eos_token_ids": []}
        handle = engine.submit([12, 13, 14], mode="ar", trace=traces.writer, **endless)
        next(iter(handle))
        handle.cancel()
    end = traces.read().runs[0].end
    assert end is not None
    assert end.error is not None
    assert "cancelled" in end.error


def test_nothing_is_recorded_without_an_observer(model: TriModeModel) -> None:
    stream = model.stream([[12, 13, 14]], "diffusion", max_new_tokens=4)
    assert stream.observer is None
    assert model.stream([[12, 13, 14]], "diffusion", max_new_tokens=4).finish().token_ids == (
        stream.finish().token_ids
    )


def test_auto_gives_reasons_for_its_switches(model: TriModeModel, tmp_path: Path) -> None:
    costs = StepCosts(
        (0, 512),
        (1.0, 1.0),
        {8: (1.0, 1.0), 32: (9.0, 9.0)},
        {8: (1.0, 1.0), 32: (9.0, 9.0)},
    )
    ids = np.random.default_rng(3).integers(12, 90, 20).tolist()
    options: dict[str, Any] = {"costs": costs, "max_new_tokens": 400, "eos_token_ids": []}
    run, result = traced(model, ids, "auto", tmp_path / "t", **options)
    assert result.picks is not None
    switches = [step.switch for step in run.forwards if step.switch is not None]
    assert set(result.picks) == {1, 8}
    assert {(one.before, one.after) for one in switches} == {(8, 1), (1, 8)}
    assert all("expected of a block of" in one.reason for one in switches)


# --- the command


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", *arguments])


@pytest.mark.parametrize("mode", [mode.replace("_", "-") for mode in MODES])
def test_command_writes_a_trace(demo: Path, tmp_path: Path, mode: str) -> None:
    file = tmp_path / "trace.jsonl"
    found = run_cli(
        str(demo), "--prompt", PROMPTS[0], "--mode", mode, "--trace", str(file), "--json"
    )
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout.splitlines()[-1])
    run = read_trace(file).runs[0]
    assert (run.token_ids, run.text) == (answer["token_ids"], answer["text"])
    assert run.start.mode.replace("_", "-") == mode
    assert [path.name for path in tmp_path.iterdir()] == ["trace.jsonl"]


@pytest.mark.parametrize("batch", ["1", "3"])
def test_command_traces_a_file_of_prompts(demo: Path, tmp_path: Path, batch: str) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "trace.jsonl"
    lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    prompts.write_text("\n".join([*lines[:2], "{}", lines[2]]), encoding="utf-8")
    found = run_cli(
        str(demo), "--prompts-file", str(prompts), "--batch", batch, "--trace", str(file), "--json"
    )
    assert found.exit_code == 2
    answers = [json.loads(line) for line in found.stdout.splitlines() if '"token_ids"' in line]
    trace = read_trace(file)
    assert sorted(run.text or "" for run in trace.runs.values()) == sorted(
        answer["text"] for answer in answers
    )
    named = set(trace.texts)
    assert {token for run in trace.runs.values() for token in run.token_ids} <= named


def test_command_refuses_a_folder_before_the_work(demo: Path, tmp_path: Path) -> None:
    found = run_cli(str(demo), "--prompt", "x", "--trace", str(tmp_path))
    assert found.exit_code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no line"),
        ("{}", "kind"),
        ('{"kind":"header","schema_version":2}', "expected schema version 1, found 2"),
        ("[1", "line 1, column 3"),
        ('{"kind":"end","run":0}', "header"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "t").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=found):
        read_trace(tmp_path / "t")


def test_lines_of_no_run_are_refused(model: TriModeModel, tmp_path: Path) -> None:
    traces = Traces(model, tmp_path / "t")
    traces.lines.append('{"kind":"end","run":7}')
    with pytest.raises(UsageError, match="run at work"):
        traces.read()
