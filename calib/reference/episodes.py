"""Records the runtime's decoders over the trunk, and replays what they ran.

So the layers see what they see when the model is used.

Calibration algorithms read their data several times, and some weigh every forward alike, so a
decode step of one row would count as much as a whole prompt. The replay therefore reads each text
that was written, prompt and answer, in one causal forward: these are the rows of prefill, decode
and commit. The blocks that draft and verify graphs got follow as they were, against the keys and
values of the tokens before them. Nothing of an answer is decided anew, so every replay is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimode.calib.reference.torch_session import TorchCache, TorchSession
from trimode.formats.contract import GraphName, Mode, ModelInfo
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.runtime.decode.algorithms import ALGORITHMS, Counters
from trimode.runtime.decode.forward import NotFiniteError
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import PREFILL_CHUNK
from trimode.runtime.decode.sequence import Sequence as DecodedSequence
from trimode.runtime.sessions.base import Array, Ids, KVCache
from trimode.runtime.text.prompts import Text

THRESHOLDS: dict[Mode, float] = {"ar": 0.0, "diffusion": 0.9, "linear_spec": 0.0}


class BlockForward(NamedTuple):
    """Holds a forward of the draft or the verify graph.

    ``ids`` are L tokens after the first ``past_length`` of the text.
    """

    graph_name: GraphName
    ids: Text
    past_length: int
    drafter_scale: float


class ReplayedForward(NamedTuple):
    """Holds a forward of any graph, as it is replayed.

    ``first_logits_row`` is the first of its rows that the head reads.
    """

    graph_name: GraphName
    ids: Text
    past_length: int
    drafter_scale: float
    first_logits_row: int


@dataclass(frozen=True)
class Episode:
    """Holds a prompt with a mode's answer, and the blocks behind it."""

    tokens: Text
    prompt_length: int
    blocks: tuple[BlockForward, ...]


class RecordingSession(TorchSession):
    """Remembers the blocks that it ran in some of the graphs.

    Attributes:
        failure: First error of numbers that were not finite; the text ends there.
    """

    def __init__(self, trunk: TriModeTrunk, graph_names: Sequence[GraphName]) -> None:
        super().__init__(trunk)
        self._graph_names = graph_names
        self._blocks: list[BlockForward] = []
        self.failure: NotFiniteError | None = None

    def run(
        self,
        graph_name: GraphName,
        cache: KVCache,
        input_ids: Ids,
        past_length: int,
        drafter_scale: float = 0.0,
    ) -> tuple[Array, ...]:
        """Run a graph, and record the forward of a draft or verification."""
        if graph_name != "ar" and graph_name in self._graph_names:
            self._blocks.append(
                BlockForward(graph_name, input_ids[0].tolist(), past_length, drafter_scale)
            )
        return super().run(graph_name, cache, input_ids, past_length, drafter_scale)

    def take(self) -> tuple[BlockForward, ...]:
        """Return the blocks since the last call."""
        taken, self._blocks = tuple(self._blocks), []
        return taken


def decoders_for(graph_names: Sequence[GraphName]) -> tuple[Mode, ...]:
    """List the modes that bring about the rows of these graphs.

    Diffusion denoises, self-speculation drafts with the adapter and verifies.
    """
    chosen: list[Mode] = ["ar"]
    if "draft" in graph_names:
        chosen.append("diffusion")
    if "draft" in graph_names or "verify" in graph_names:
        chosen.append("linear_spec")
    return tuple(chosen)


def answer(
    session: RecordingSession,
    model: ModelInfo,
    text: Text,
    graph_names: Sequence[GraphName],
    max_new_tokens: int,
) -> list[Episode]:
    """Answer a text in each mode that the graphs need."""
    episodes = []
    for mode in decoders_for(graph_names):
        sequence = DecodedSequence(session, model, text)
        options = DecodeOptions(
            max_new_tokens=max_new_tokens, block_length=model.block_size, threshold=THRESHOLDS[mode]
        )
        try:
            for _ in ALGORITHMS[mode](sequence, options, Counters()):
                pass
        except NotFiniteError as error:  # the replay of what there is names the layer
            session.failure = session.failure or error
        episodes.append(Episode(sequence.tokens, len(text), session.take()))
    return episodes


def merged(episodes: Sequence[Episode]) -> list[Episode]:
    """Merge episodes of one text.

    Self-speculation writes what AR writes, and its causal rows are seen once.
    """
    found: dict[tuple[int, ...], Episode] = {}
    for episode in episodes:
        key = (episode.prompt_length, *episode.tokens)
        before = found[key].blocks if key in found else ()
        found[key] = Episode(episode.tokens, episode.prompt_length, before + episode.blocks)
    return list(found.values())


def forwards_of(episode: Episode) -> list[ReplayedForward]:
    """List the forwards of a replay: text in chunks, then blocks."""
    starts = range(0, len(episode.tokens), PREFILL_CHUNK)
    # The ar graph returns logits of a prompt's last row and of each row after it, the others of
    # every row.
    texts = [
        ReplayedForward(
            "ar",
            episode.tokens[i : i + PREFILL_CHUNK],
            i,
            0.0,
            max(0, episode.prompt_length - 1 - i),
        )
        for i in starts
    ]
    return texts + [ReplayedForward(*block, first_logits_row=0) for block in episode.blocks]


def pattern_for(forward: ReplayedForward, text: TorchCache) -> TorchCache:
    """Choose how a forward attends.

    The text's own chunks fill ``text``. Blocks read what lies before them and leave it alone.
    """
    if forward.graph_name == "ar":
        return text
    before = TorchCache.of(
        [(k[:, :, : forward.past_length], v[:, :, : forward.past_length]) for k, v in text.layers]
    )
    before.writes_cache, before.is_causal = False, forward.graph_name != "draft"
    return before


def count_rows(episodes: Sequence[Episode]) -> dict[GraphName, int]:
    """Count the tokens of all forwards, by graph."""
    counts: dict[GraphName, int] = {}
    for forward in (forward for episode in episodes for forward in forwards_of(episode)):
        counts[forward.graph_name] = counts.get(forward.graph_name, 0) + len(forward.ids)
    return counts
