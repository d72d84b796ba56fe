"""The speed of light against a slow, obvious search with the independent model, and the command
that reports it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from commands import trimode
from conftest import Built

from trimode.calib.evaluate.speed_of_light import oracle as search
from trimode.calib.evaluate.speed_of_light.measure import SERIAL, LightSettings, measure_light
from trimode.calib.evaluate.speed_of_light.oracle import ORACLES, BlockOracle
from trimode.runtime.decode.algorithms import ALGORITHMS, Counters
from trimode.runtime.decode.options import DecodeOptions

MASK = 100
PROMPTS = [[20, 30, 40], [77], [12, 13, 14, 15, 16]]


def ranked(
    it: Built, prompt: list[int], block: list[int], free: list[int]
) -> list[tuple[int, int]]:
    """The free slots and their best tokens, most confident first; the whole text is recomputed."""
    probabilities, ids = (
        it.reference.logits(prompt + block, block=len(block))[-len(block) :].softmax(-1).max(-1)
    )
    return [(i, int(ids[i])) for i in sorted(free, key=lambda i: -float(probabilities[i]))]


def serial_block(it: Built, prompt: list[int], length: int) -> list[int]:
    block = [it.reference.pick(it.reference.logits(prompt)[-1])] + [MASK] * (length - 1)
    free = list(range(1, length))
    while free:
        slot, token = ranked(it, prompt, block, free)[0]
        block[slot] = token
        free.remove(slot)
    return block


def all_paths(
    it: Built,
    prompt: list[int],
    target: list[int],
    free: list[int],
    oracle: str,
    memory: dict[Any, Any],
) -> list[list[int]] | None:
    """The steps of the largest safe steps first, by plain recursion."""
    end = target.index(11) if 11 in target else len(target)
    if not any(slot < end for slot in free):
        return []
    if tuple(free) in memory:
        return memory[tuple(free)]  # type: ignore[no-any-return]
    block = [MASK if i in free else token for i, token in enumerate(target)]
    slots = []
    for slot, token in ranked(it, prompt, block, free):
        if token == target[slot]:
            slots.append(slot)
        elif oracle == "prefix":
            break
    found = None
    for size in range(len(slots), 0, -1):
        rest = all_paths(
            it, prompt, target, [i for i in free if i not in slots[:size]], oracle, memory
        )
        if rest is not None:
            found = [slots[:size], *rest]
            break
    memory[tuple(free)] = found
    return found


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_search_is_the_obvious_one(
    built: Callable[[str], Built], prompt: list[int], oracle: Any
) -> None:
    it, length = built("three_kv_heads"), 7
    target = serial_block(it, prompt, length)
    sequence = it.model.new_sequence([prompt])
    block = np.array([sequence.run(sequence.predict())] + [MASK] * (length - 1))
    found = BlockOracle(lambda slots: sequence.run(sequence.denoise(slots)), block, MASK, (11,))
    assert found.target.tolist() == target
    expected = all_paths(it, prompt, target, list(range(1, length)), oracle, {})
    assert expected is not None
    path = found.fewest(oracle)
    assert [list(step) for step in path.steps] == expected
    assert len(path.steps) <= len(found.serial.steps) <= length - 1
    assert not path.is_exhausted


class Scripted:
    """A model made up so that the largest step leads nowhere.

    The target is 5 6 7 8. Slots 1 and 2 are right at once; with both filled and 3 not, slot 3 is
    wrong for good.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[int, ...]] = []

    def __call__(self, block: Any) -> tuple[Any, Any]:
        self.blocks.append(tuple(block))
        filled = {i for i in range(1, 4) if block[i] != MASK}
        tokens, confidence = [5, 6, 7, 9], [0.0, 0.9, 0.8, 0.1]
        if filled == {1}:
            tokens, confidence = [5, 6, 7, 8], [0.0, 0.0, 0.2, 0.9]  # serial goes on with slot 3
        if filled == {1, 3}:
            tokens = [5, 6, 7, 8]
        return np.array(tokens)[:, None], np.array(confidence)[:, None]


def test_an_unsafe_step_is_taken_back() -> None:
    script = Scripted()
    oracle = BlockOracle(script, np.array([5, MASK, MASK, MASK]), MASK, ())
    assert oracle.target.tolist() == [5, 6, 7, 8]
    assert oracle.serial.steps == ((1,), (3,), (2,))
    assert oracle.fewest("prefix").steps == ((1,), (3, 2))
    assert len(script.blocks) == len(set(script.blocks))  # no block twice
    fresh = BlockOracle(Scripted(), np.array([5, MASK, MASK, MASK]), MASK, ())
    cut = fresh.fewest("prefix", max_forwards=0)
    assert cut.is_exhausted == (len(cut.steps) == 3)


def test_what_follows_an_end_token_does_not_count() -> None:
    script = Scripted()
    oracle = BlockOracle(script, np.array([5, MASK, MASK, MASK]), MASK, (6,))
    assert oracle.serial.steps == ((1,),)
    assert oracle.fewest("prefix").steps == ((1, 2),)


@pytest.mark.parametrize("name", ["three_kv_heads", "plain"])
def test_all_ways_over_prompts(built: Callable[[str], Built], name: str) -> None:
    it, length, count = built(name), 5, 17
    prompts, serial, nfe = [], [], 0
    for first in range(20, 60):
        # Serial denoising is the runtime's own diffusion under a threshold that nothing reaches.
        # Where the model chooses the mask token, that one denoises the slot again; such texts are
        # left out.
        sequence, counters = it.model.new_sequence([[first, 30]]), Counters()
        for _ in ALGORITHMS["diffusion"](
            sequence, DecodeOptions(count, length, math.inf), counters
        ):
            pass
        if counters.nfe == sequence.forwards.commit * length and len(prompts) < 3:
            prompts.append([first, 30])
            serial.append(sequence.tokens[2:])
            nfe += counters.nfe
    assert len(prompts) == 3
    settings, told = LightSettings(length, (0.1, 0.9), count), []
    ways = {way.name: way for way in measure_light(it.model, prompts, settings, told.append)}
    assert told == [1] * 3
    tokens = sum(map(len, serial))
    assert (ways[SERIAL].num_tokens, ways[SERIAL].nfe) == (tokens, nfe)
    light, anyhow = ways["speed of light"], ways["speed of light, slots in any order"]
    for way in (light, anyhow):
        assert (way.num_tokens, way.same_as_target, way.num_exhausted) == (tokens, 1.0, 0)
        assert way.tokens_per_forward == tokens / way.nfe
        # a commit a block
        assert way.nfe - way.num_steps == ways[SERIAL].nfe - ways[SERIAL].num_steps
        assert way.nfe < ways[SERIAL].nfe
    for threshold in (0.1, 0.9):
        way = ways[f"diffusion, threshold {threshold:g}"]
        theirs = [
            reference.diffusion(it.reference, prompt, count, length, threshold)
            for prompt in prompts
        ]
        assert (way.num_tokens, way.nfe) == (
            sum(len(t) for t, _ in theirs),
            sum(n for _, n in theirs),
        )
        assert way.same_as_target == sum(
            text == s for (text, _), s in zip(theirs, serial, strict=True)
        ) / len(prompts)
    for label, drafter in (
        ("linear-spec", it.model.model.has_drafter),
        ("linear-spec, no drafter", False),
    ):
        if label in ways:
            theirs = [
                reference.linear_spec(it.reference, prompt, count, length, 0.0, drafter)
                for prompt in prompts
            ]
            assert (ways[label].nfe, ways[label].same_as_target) == (sum(n for _, n in theirs), 1.0)
            assert ways[label].num_steps == sum((n - 1) // 2 for _, n in theirs)
    assert ("linear-spec, no drafter" in ways) == it.model.model.has_drafter
    assert (ways["ar"].tokens_per_forward, ways["ar"].same_as_target) == (1.0, 1.0)


def test_a_search_that_is_cut_short_says_so(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    ways = {
        way.name: way
        for way in measure_light(
            it.model, PROMPTS, LightSettings(9, (), 9, max_forwards=0), lambda _: None
        )
    }
    assert ways["speed of light"].num_exhausted
    assert ways["speed of light"].nfe <= ways[SERIAL].nfe
    assert search.MAX_FORWARDS == 5000


def test_the_command_writes_table_json_and_picture(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "light"
    prompts.write_text('{"token_ids": [20, 30]}\n{"token_ids": [40]}\n')
    options = (
        "--speed-of-light",
        "--prompts-file",
        prompts,
        "--block-length",
        4,
        "--max-new-tokens",
        8,
        "--thresholds",
        "0.3",
        "--threads",
        1,
    )
    done = trimode("bench", built("three_kv_heads").bundle, *options, "-o", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "speed_of_light.json").read_text())
    assert (report["num_prompts"], report["block_length"], report["max_new_tokens"]) == (2, 4, 8)
    assert (out / "speed_of_light.png").read_bytes().startswith(b"\x89PNG")
    for way in report["ways"]:
        assert way["name"] in done.stdout
    printed = trimode("bench", built("three_kv_heads").bundle, *options, "--json")
    assert json.loads(printed.stdout)["ways"] == report["ways"]
    assert "Traceback" not in done.stderr + printed.stderr


BAD = {
    "no prompts": (["--speed-of-light"], "--prompts-file"),
    "options of the other": (["--speed-of-light", "--rows", "8"], "--rows without"),
    "options of this": (["--thresholds", "0.5"], "--thresholds together with"),
    "thresholds": (
        ["--speed-of-light", "--prompts-file", "PROMPTS", "--thresholds", "high"],
        "probabilities like",
    ),
    "threshold 2": (
        ["--speed-of-light", "--prompts-file", "PROMPTS", "--thresholds", "2"],
        "from 0 to 1",
    ),
    "block": (
        ["--speed-of-light", "--prompts-file", "PROMPTS", "--block-length", "65"],
        "from 1 to 64",
    ),
    "a folder of something else": (
        ["--speed-of-light", "--prompts-file", "PROMPTS", "-o", "FOLDER"],
        "expected a new or empty folder",
    ),
    "prompt out of range": (["--speed-of-light", "--prompts-file", "FAR"], "from 0 to 108"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(built: Callable[[str], Built], tmp_path: Path, case: str) -> None:
    args, message = BAD[case]
    (tmp_path / "prompts.jsonl").write_text('{"token_ids": [20]}\n')
    (tmp_path / "far.jsonl").write_text('{"token_ids": [20]}\n{"token_ids": [500]}\n')
    places = {
        "PROMPTS": tmp_path / "prompts.jsonl",
        "FAR": tmp_path / "far.jsonl",
        "FOLDER": tmp_path,
    }
    done = trimode("bench", built("three_kv_heads").bundle, *(places.get(a, a) for a in args))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
