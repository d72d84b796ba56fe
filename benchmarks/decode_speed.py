"""Tokens per second of the modes on the demo bundle, and of the torch trunk run eagerly with a
growing cache.

    python -m benchmarks.decode_speed BUNDLE CHECKPOINT [--threads 2] [--prompts 36]

All are timed in one run, round after round, so that the machine's mood hits each of them; a round
is every prompt once. The share of a step that is spent outside of the engine is measured by timing
the engine call inside of the step.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments_of, median, save
from trimode.calib.demo.tasks import examples
from trimode.calib.reference.torch_session import load_trunk
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.decoder.attention import GrowingCacheAttention
from trimode.graphs.decoder.trunk import TriModeTrunk
from trimode.runtime import TriModeModel

ROUNDS = 5
MAX_NEW_TOKENS = 192


@torch.inference_mode()
def torch_ar(trunk: TriModeTrunk, prompt: list[int]) -> list[int]:
    """The obvious eager decoder: the head on the last row only, a cache that grows by
    concatenation.
    """
    attend, out = GrowingCacheAttention(), []
    ids = torch.tensor([prompt])
    while len(out) < MAX_NEW_TOKENS:
        positions = torch.arange(attend.length, attend.length + ids.shape[1])[None]
        out.append(int(trunk.head(trunk(ids, positions, attend)[:, -1]).argmax()))
        if out[-1] in trunk.config.eos_token_ids:
            break
        ids = torch.tensor([[out[-1]]])
    return out


def ours(model: TriModeModel, mode: Any, **options: Any) -> Callable[[list[int]], list[int]]:
    def generate(prompt: list[int]) -> list[int]:
        stream = model.stream([prompt], mode, max_new_tokens=MAX_NEW_TOKENS, **options)
        return [token for chunk in stream for token in chunk.token_ids]

    return generate


class Stopwatch:
    """Adds up the time spent inside the engine."""

    def __init__(self, model: TriModeModel) -> None:
        self.seconds, self.forwards = 0.0, 0
        for graph_name, session in model.session.sessions.items():  # type: ignore[attr-defined]
            model.session.sessions[graph_name] = self._watched(session)  # type: ignore[attr-defined]

    def _watched(self, session: Any) -> Any:
        watch = self

        class Watched:
            io_binding = session.io_binding

            def run_with_iobinding(self, binding: Any) -> None:
                start = time.perf_counter()
                session.run_with_iobinding(binding)
                watch.seconds += time.perf_counter() - start
                watch.forwards += 1

        return Watched()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=36)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = TriModeModel.from_pretrained(args.bundle, num_threads=args.threads)
    checkpoint = open_checkpoint(args.checkpoint)
    trunk = load_trunk(checkpoint, checkpoint.config.max_position_embeddings)
    chosen = itertools.islice(examples(1, "held-out"), args.prompts)
    prompts = [model.codec.encode_chat([{"role": "user", "content": e.prompt}]) for e in chosen]
    runners: dict[str, Callable[[list[int]], list[int]]] = {
        "torch eager ar": lambda prompt: torch_ar(trunk, prompt),
        "ar": ours(model, "ar"),
        "diffusion": ours(model, "diffusion"),
        "linear-spec": ours(model, "linear_spec"),
        "linear-spec, no drafter": ours(model, "linear_spec", use_drafter=False),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    outputs: dict[str, list[list[int]]] = {}
    for _ in range(ROUNDS + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            outputs[name] = [run(prompt) for prompt in prompts]
            rounds[name].append(
                {"seconds": time.perf_counter() - start, "tokens": sum(map(len, outputs[name]))}
            )
    # the first round warms up
    speeds = {
        name: [r["tokens"] / r["seconds"] for r in values[1:]] for name, values in rounds.items()
    }
    profile = {
        mode: profile_of(args.bundle, args.threads, prompts, mode)
        for mode in ("ar", "diffusion", "linear_spec")
    }
    report(speeds, profile, outputs, vars(args))


def profile_of(bundle: Path, threads: int, prompts: list[list[int]], mode: Any) -> dict[str, float]:
    """Where a mode's time goes: microseconds per forward in the engine's call and in the Python
    around it, and the latter's share.
    """
    model = TriModeModel.from_pretrained(bundle, num_threads=threads)
    watch = Stopwatch(model)
    run = ours(model, mode)
    for prompt in prompts:
        run(prompt)
    watch.seconds, watch.forwards, start = 0.0, 0, time.perf_counter()
    for prompt in prompts:
        run(prompt)
    total = time.perf_counter() - start
    outside = total - watch.seconds
    return {
        "engine_us": 1e6 * watch.seconds / watch.forwards,
        "python_us": 1e6 * outside / watch.forwards,
        "python_share": outside / total,
    }


def report(
    speeds: dict[str, list[float]],
    profile: dict[str, dict[str, float]],
    outputs: dict[str, list[list[int]]],
    arguments: dict[str, Any],
) -> None:
    medians = {name: median(values) for name, values in speeds.items()}
    ratios = {
        "ar_over_torch_eager": medians["ar"] / medians["torch eager ar"],
        "linear_spec_over_ar": medians["linear-spec"] / medians["ar"],
        "linear_spec_over_torch_eager": medians["linear-spec"] / medians["torch eager ar"],
    }
    same = {
        name: sum(a == b for a, b in zip(outputs[name], outputs["torch eager ar"], strict=True))
        for name in outputs
    }
    for name, value in medians.items():
        print(
            f"{name:26s} {value:8.0f} tokens/s   same tokens as torch eager AR: {same[name]} of "
            f"{len(outputs[name])}"
        )
    for name, value in ratios.items():
        print(f"{name:30s} {value:6.2f}")
    for mode, row in profile.items():
        print(
            f"{mode:12s} a forward: engine {row['engine_us']:5.0f} us, Python around it "
            f"{row['python_us']:4.0f} us ({100 * row['python_share']:.1f}%)"
        )
    save(
        "decode_speed",
        {
            "arguments": arguments_of(arguments),
            "tokens_per_s": speeds,
            "ratios": ratios,
            "profile": profile,
            "same_tokens_as_torch_eager": same,
        },
    )


if __name__ == "__main__":
    main()
