"""What the layers see when the model is used: the runtime's decoders run over the trunk, and what they ran is replayed.

Calibration algorithms read their data several times, and some weigh every forward alike, so a decode step of one row would count as much
as a whole prompt. The replay therefore reads each text that was written, prompt and answer, in one causal forward: these are the rows of
prefill, decode and commit. The blocks that draft and verify graphs got follow as they were, against the keys and values of the tokens
before them. Nothing of an answer is decided anew, so every replay is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimode.calib.quantize.texts import Text
from trimode.calib.torch_session import TorchCache, TorchSession
from trimode.graphs.contract import ModelInfo, Role
from trimode.graphs.trunk import TriModeTrunk
from trimode.runtime.decode import ALGORITHMS, Counters
from trimode.runtime.options import DecodeOptions, Mode
from trimode.runtime.sequence import PREFILL_CHUNK
from trimode.runtime.sequence import Sequence as DecodedSequence
from trimode.runtime.session import Array, Ids, KVCache

Advance = Callable[[int], None]
Watch = Callable[[Role, int], AbstractContextManager[None]]
"""Entered around each forward with its role and number of rows."""
THRESHOLDS: dict[Mode, float] = {"ar": 0.0, "diffusion": 0.9, "linear_spec": 0.0}


class Block(NamedTuple):
    """A forward of the draft or the verify graph: ``ids`` L tokens after the first ``past_length`` of the text."""

    role: Role
    ids: Text
    past_length: int
    drafter_scale: float


@dataclass(frozen=True)
class Episode:
    """A prompt with the answer that a mode gave, and the blocks that led there."""

    tokens: Text
    prompt_length: int
    blocks: tuple[Block, ...]


class RecordingSession(TorchSession):
    """Remembers the blocks that it ran in some of the roles."""

    def __init__(self, trunk: TriModeTrunk, roles: Sequence[Role]) -> None:
        super().__init__(trunk)
        self._roles = roles
        self._blocks: list[Block] = []

    def run(self, role: Role, cache: KVCache, input_ids: Ids, past_length: int, drafter_scale: float = 0.0) -> tuple[Array, ...]:
        """See :class:`trimode.runtime.session.Session`."""
        if role != "ar" and role in self._roles:
            self._blocks.append(Block(role, input_ids[0].tolist(), past_length, drafter_scale))
        return super().run(role, cache, input_ids, past_length, drafter_scale)

    def take(self) -> tuple[Block, ...]:
        """The blocks since the last call."""
        taken, self._blocks = tuple(self._blocks), []
        return taken


def decoders_for(roles: Sequence[Role]) -> tuple[Mode, ...]:
    """The modes that bring about the rows of these graphs: diffusion denoises, self-speculation drafts with the adapter and verifies."""
    chosen: list[Mode] = ["ar"]
    if "draft" in roles:
        chosen.append("diffusion")
    if "draft" in roles or "verify" in roles:
        chosen.append("linear_spec")
    return tuple(chosen)


def record(
    trunk: TriModeTrunk, model: ModelInfo, texts: Sequence[Text], roles: Sequence[Role], max_new_tokens: int, advance: Advance
) -> list[Episode]:
    """Answer each text in each mode that the roles need; ``advance(1)`` after each answer."""
    session = RecordingSession(trunk, roles)
    episodes = []
    for text in texts:
        for mode in decoders_for(roles):
            sequence = DecodedSequence(session, model, text)
            options = DecodeOptions(max_new_tokens=max_new_tokens, block_length=model.block_size, threshold=THRESHOLDS[mode])
            for _ in ALGORITHMS[mode](sequence, options, Counters()):
                pass
            episodes.append(Episode(sequence.tokens, len(text), session.take()))
            advance(1)
    return merged(episodes)


def merged(episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes of one text as one: self-speculation writes what AR writes, and its causal rows are seen once."""
    found: dict[tuple[int, ...], Episode] = {}
    for episode in episodes:
        key = (episode.prompt_length, *episode.tokens)
        before = found[key].blocks if key in found else ()
        found[key] = Episode(episode.tokens, episode.prompt_length, before + episode.blocks)
    return list(found.values())


@torch.no_grad()
def replay(
    trunk: TriModeTrunk, episodes: Sequence[Episode], advance: Advance, watch: Watch = lambda *_: nullcontext(), *, needs_head: bool = False
) -> None:
    """Run every forward of the episodes again; ``advance(1)`` after each episode.

    Args:
        trunk: the model, whose layers may have been replaced.
        episodes: what to run.
        advance: told of each episode that is done.
        watch: see :data:`Watch`.
        needs_head: run the head too, on the rows whose logits a graph returns.
    """
    for episode in episodes:
        for role, cache, ids, past_length, scale in _forwards(episode):
            with watch(role, len(ids)):
                hidden = _forward(trunk, role, cache, ids, past_length, scale)
                if needs_head:
                    trunk.head(hidden[:, _first_row(role, past_length, episode) :])
        advance(1)


def _forwards(episode: Episode) -> Iterator[tuple[Role, TorchCache, Text, int, float]]:
    cache = TorchCache()
    for start in range(0, len(episode.tokens), PREFILL_CHUNK):
        yield "ar", cache, episode.tokens[start : start + PREFILL_CHUNK], start, 0.0
    for block in episode.blocks:
        before = TorchCache.of([(k[:, :, : block.past_length], v[:, :, : block.past_length]) for k, v in cache.layers])
        before.writes_cache = False
        yield block.role, before, block.ids, block.past_length, block.drafter_scale


def _forward(trunk: TriModeTrunk, role: Role, cache: TorchCache, ids: Text, past_length: int, drafter_scale: float) -> Tensor:
    device = trunk.diffusion_head.weight.device
    cache.is_causal = role != "draft"
    positions = torch.arange(past_length, past_length + len(ids), device=device)[None]
    return trunk(torch.tensor([ids], device=device), positions, cache, drafter_scale or None)  # type: ignore[no-any-return]


def _first_row(role: Role, past_length: int, episode: Episode) -> int:
    """The ar graph returns logits of a prompt's last row and of each row after it, the others of every row."""
    return max(0, episode.prompt_length - 1 - past_length) if role == "ar" else 0
