"""Decodes the same prompts in every way: oracles, thresholds, self-speculation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trimode.calib.evaluate.speed_of_light.oracle import MAX_FORWARDS, ORACLES, BlockOracle, Path
from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.formats.speed_of_light import WayRecord
from trimode.runtime.decode.algorithms import ALGORITHMS
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.model import TriModeModel
from trimode.runtime.sessions.base import Array, Ids

DEFAULT_THRESHOLDS = (0.5, 0.7, 0.9, 0.95)
Target = Literal["serial denoising", "ar"]
SERIAL: Target = "serial denoising"
_CYCLE_PHASES = ("verify", "quadratic")
"""Forwards of which a cycle of self-speculation has one."""


@dataclass(frozen=True)
class LightSettings:
    """Holds the choices of a caller.

    Attributes:
        block_length: Length of blocks, where there are any; None = the model's block size.
        thresholds: Thresholds of diffusion.
        max_new_tokens: Longest answer, in tokens.
        max_forwards: Most forwards of the search for one block.
    """

    block_length: int | None = None
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    max_new_tokens: int = 128
    max_forwards: int = MAX_FORWARDS


@dataclass
class Way:
    """Counts the answers of one way to decode."""

    name: str
    target: Target
    texts: list[list[int]] = field(default_factory=list)
    nfe: int = 0
    steps: int = 0
    stepped_tokens: int = 0
    exhausted: int | None = None

    def add(self, token_ids: list[int], *, nfe: int, steps: int, stepped_tokens: int) -> None:
        """Add an answer; ``stepped_tokens`` are the tokens of its steps."""
        self.texts.append(token_ids)
        self.nfe += nfe
        self.steps += steps
        self.stepped_tokens += stepped_tokens

    def record(self, targets: Sequence[list[int]]) -> WayRecord:
        """Return the counts, compared with the texts to reproduce."""
        tokens = sum(map(len, self.texts))
        return WayRecord(
            name=self.name,
            target=self.target,
            num_tokens=tokens,
            nfe=self.nfe,
            tokens_per_forward=tokens / self.nfe,
            num_steps=self.steps,
            tokens_per_step=self.stepped_tokens / self.steps if self.steps else math.nan,
            same_as_target=sum(a == b for a, b in zip(self.texts, targets, strict=True))
            / len(targets),
            num_exhausted=self.exhausted,
        )


def measure_light(
    model: TriModeModel,
    prompts: Sequence[list[int]],
    settings: LightSettings,
    advance: Callable[[int], None],
) -> tuple[WayRecord, ...]:
    """Answer each prompt in every way; ``advance(1)`` after each.

    Raises:
        UsageError: a value of the settings, or a prompt, that the model does not take.
    """
    length = settings.block_length or model.model.block_size
    diffusion: dict[str, Way] = {
        SERIAL: Way(SERIAL, SERIAL),
        **{name: Way(_oracle_name(name), SERIAL, exhausted=0) for name in ORACLES},
    }
    streamed = list(_streamed_ways(model, settings, length))
    # a value out of its range shows before the search, which takes long
    for options, way in streamed:
        model.stream([prompts[0]], max_new_tokens=settings.max_new_tokens, **options)
        assert not way.texts
    for prompt in prompts:
        _denoise_by_oracles(model, prompt, length, settings, diffusion)
        for options, way in streamed:
            _answer(model, prompt, {"max_new_tokens": settings.max_new_tokens, **options}, way)
        advance(1)
    targets = {SERIAL: diffusion[SERIAL].texts, "ar": streamed[0][1].texts}
    return tuple(
        way.record(targets[way.target])
        for way in (*diffusion.values(), *(way for _, way in streamed))
    )


def _oracle_name(oracle: str) -> str:
    return {"prefix": "speed of light", "any": "speed of light, slots in any order"}[oracle]


def _streamed_ways(
    model: TriModeModel, settings: LightSettings, length: int
) -> list[tuple[dict[str, Any], Way]]:
    """List AR, thresholds, the bundle's sampler, then every other algorithm.

    Those are left out that it cannot run. The drafter is tried where that matters.
    """
    ways: list[tuple[dict[str, Any], Way]] = [({"mode": "ar"}, Way("ar", "ar"))]
    for threshold in settings.thresholds:
        options = {"mode": "diffusion", "threshold": threshold, "block_length": length}
        ways.append((options, Way(f"diffusion, threshold {threshold:g}", SERIAL)))
    if (sampler := model.bundle.manifest.sampler) is not None:
        options = {"mode": "diffusion", "sampler": "learned", "block_length": length}
        ways.append(
            (options, Way(f"diffusion, learned sampler from {sampler.threshold:g}", SERIAL))
        )
    for mode in ALGORITHMS:
        if mode in ("ar", "diffusion"):
            continue
        drafters = (True, False) if mode == "linear_spec" and model.model.has_drafter else (False,)
        for use_drafter in drafters:
            options = {"mode": mode, "use_drafter": use_drafter}
            if mode == "linear_spec":
                options["block_length"] = length  # the others have lengths of their own
            elif not _can_run(model, mode):
                continue
            name = mode.replace("_", "-") + (
                "" if use_drafter or len(drafters) == 1 else ", no drafter"
            )
            ways.append((options, Way(name, "ar")))
    return ways


def _can_run(model: TriModeModel, mode: Mode) -> bool:
    """Tell whether the bundle has the graphs of a mode."""
    try:
        model.stream([[0]], mode)
    except UsageError:
        return False
    return True


def _answer(model: TriModeModel, prompt: list[int], options: dict[str, Any], way: Way) -> None:
    result = model.stream([prompt], **options).finish()
    if result.acceptance_length is not None:
        cycles = sum(vars(result.forwards).get(phase, 0) for phase in _CYCLE_PHASES)
        way.add(
            result.token_ids,
            nfe=result.nfe,
            steps=cycles,
            stepped_tokens=round(result.acceptance_length * cycles),
        )
    else:
        steps = result.forwards.denoise or result.nfe
        way.add(result.token_ids, nfe=result.nfe, steps=steps, stepped_tokens=len(result.token_ids))


def _denoise_by_oracles(
    model: TriModeModel,
    prompt: list[int],
    length: int,
    settings: LightSettings,
    ways: dict[str, Way],
) -> None:
    """Write the serial answer, and take each oracle's steps to each block.

    Blocks are those of :func:`~trimode.runtime.decode.algorithms.decode_diffusion`.
    """
    sequence, facts = model.new_sequence([prompt]), model.model
    left = min(settings.max_new_tokens, sequence.room)
    text: list[int] = []
    steps, blocks = dict.fromkeys(ways, 0), 0
    while left > 0 and not (text and text[-1] in facts.eos_token_ids):
        oracle = _block_oracle(sequence, length)
        for name, path in _paths(oracle, settings).items():
            steps[name] += len(path.steps)
            if ways[name].exhausted is not None:
                ways[name].exhausted += path.is_exhausted  # type: ignore[operator]
        kept = _up_to_end(oracle.target, facts.eos_token_ids)[:left]
        total = len(sequence.tokens) + len(kept)
        sequence.run(sequence.commit(oracle.target))
        sequence.truncate(total)
        text += kept
        left -= len(kept)
        blocks += 1
    for name, way in ways.items():
        way.add(text, nfe=steps[name] + blocks, steps=steps[name], stepped_tokens=len(text))


def _block_oracle(sequence: DecodedSequence, length: int) -> BlockOracle:
    """Return the oracle of the next block, whose first token is predicted."""
    facts = sequence.model
    block = np.full(length, facts.mask_token_id, np.int64)
    block[0] = sequence.run(sequence.predict())

    def denoise(slots: Ids) -> tuple[Array, Array]:
        return sequence.run(sequence.denoise(slots))

    return BlockOracle(denoise, block, facts.mask_token_id, facts.eos_token_ids)


def _paths(oracle: BlockOracle, settings: LightSettings) -> dict[str, Path]:
    """Return the path of serial denoising, and of each oracle."""
    fewest: dict[str, Path] = {name: oracle.fewest(name, settings.max_forwards) for name in ORACLES}
    return {SERIAL: oracle.serial, **fewest}


def _up_to_end(tokens: Ids, eos: tuple[int, ...]) -> list[int]:
    """Return the tokens up to and with the first end token."""
    ends = np.flatnonzero(np.isin(tokens, eos))
    kept: list[int] = tokens[: ends[0] + 1 if len(ends) else None].tolist()
    return kept
