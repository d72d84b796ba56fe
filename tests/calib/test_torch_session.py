"""The reference of `trimode verify` against the independent model and decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from checkpoints import SHAPES, config_of, write_checkpoint

from trimode.calib.reference.torch_session import TorchSession, accepted_lengths, load_trunk
from trimode.formats.contract import Mode
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.runtime.decode.algorithms import ALGORITHMS, Counters
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.sequence import Sequence


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_those_of_ministral3(tmp_path: Path, shape: str) -> None:
    changes, dtype, rank, shards = SHAPES[shape]
    folder = write_checkpoint(tmp_path, config_of(**changes), dtype=dtype, rank=rank, shards=shards)
    checkpoint = open_checkpoint(folder)
    model, expected = describe_model(checkpoint, None), reference.Reference(folder)
    session = TorchSession(load_trunk(checkpoint, model.num_positions))

    def generate(mode: Mode, prompt: list[int], **options: Any) -> tuple[list[int], int]:
        sequence, counters = Sequence(session, model, prompt), Counters()
        for _ in ALGORITHMS[mode](sequence, DecodeOptions(**options), counters):
            pass
        return sequence.tokens[len(prompt) :], counters.nfe

    for length in (1, 7, 150):
        prompt = np.random.default_rng(length).integers(12, model.vocab_size, length).tolist()
        assert generate("ar", prompt, max_new_tokens=20) == reference.ar(expected, prompt, 20)
        assert generate(
            "diffusion", prompt, max_new_tokens=19, block_length=8, threshold=0.3
        ) == reference.diffusion(expected, prompt, 19, 8, 0.3)
        for drafter in (True, False):
            options: dict[str, Any] = {
                "max_new_tokens": 12,
                "block_length": 8,
                "threshold": 0.0,
                "use_drafter": drafter,
            }
            assert generate("linear_spec", prompt, **options) == reference.linear_spec(
                expected, prompt, 12, 8, 0.0, drafter
            )


def test_loading_completes_the_digest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config_of(), rank=4))
    whole, loading = SourceDigest(checkpoint), SourceDigest(checkpoint)
    for _ in whole.read_all():
        pass
    load_trunk(checkpoint, 10, read=loading.read)
    assert loading.hexdigest() == whole.hexdigest()


def test_accepted_lengths() -> None:
    greedy = np.array([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    ids = np.array([[1, 5, 6, 7], [1, 5, 0, 7], [1, 0, 6, 7], [1, 5, 6, 0]])
    assert accepted_lengths(greedy, ids).tolist() == [3, 1, 0, 2]
    assert accepted_lengths(greedy[:, :1], ids[:, :1]).tolist() == [0, 0, 0, 0]
