"""Tokens per second of 1, 4 and 16 requests: each mode and `auto`, beside two other runtimes.

    python -m benchmarks.serving_peers BUNDLE [--peers /tmp/peers] [--set-up] [--only demo|120m]

The peers are ONNX Runtime GenAI (a static batch) and OpenVINO GenAI (continuous batching), each in
an environment of its own and in a process that stays; ``--set-up`` makes what is missing. All are
asked in turns, in float32 and on one thread, with the same prompts. Peers have random weights of
the same shapes, since speed does not depend on them. Times are of the processor, as the machine may
be shared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import arguments_of, median, save
from benchmarks.load_engine import table_of
from benchmarks.peers.shapes import write_checkpoint
from trimode import Engine, TriModeModel
from trimode.calib.demo.tasks import examples
from trimode.runtime.measure.forwards import TimerSettings, check_settings, time_forwards

RUNNERS = Path(__file__).parent / "serving_runners"
PACKAGES = {
    "genai": (
        "onnxruntime-genai==0.18.0",
        "onnxruntime",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "torch",
        "transformers",
        "tiktoken",
    ),
    "openvino": ("openvino==2026.4.1", "openvino-genai==2026.4.1.0"),
}
ROWS = (1, 4, 16)
SHAPE_120M = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
}
NEW_TOKENS = {"demo": 48, "120m": 16}
MODES: tuple[Any, ...] = ("ar", "linear_spec", "diffusion", "auto")
Answer = Callable[[list[list[int]], int], dict[str, Any]]


def set_up(folder: Path) -> None:
    """Make the environments that are missing."""
    for name, packages in PACKAGES.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)


# --- checkpoints


def plain_tensors(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a decoder with a head of its own."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    key = sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield "model.embed_tokens.weight", (sizes["vocab_size"], hidden)
    for index in range(sizes["num_hidden_layers"]):
        for name, shape in layer.items():
            yield f"model.layers.{index}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (sizes["vocab_size"], hidden)


def write_plain(folder: Path, sizes: dict[str, int]) -> None:
    """A Mistral, whose heads need not divide its width."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        **sizes,
    }
    write_checkpoint(folder, config, dict(plain_tensors(sizes)))


def build_120m(folder: Path) -> Path:
    """A bundle of the family with these sizes."""
    from trimode.compiler.pipeline import build_bundle
    from trimode.graphs.checkpoint import expected_tensors
    from trimode.graphs.config import parse_config

    config = json.loads(Path("artifacts/nld-tiny/config.json").read_text())
    config = {**config, **SHAPE_120M, "tie_word_embeddings": False, "eos_token_id": 11}
    shapes = expected_tensors(parse_config(config))
    write_checkpoint(folder / "nld", config, {name: tuple(s) for name, s in shapes.items()})
    build_bundle(folder / "nld", folder / "bundle")
    return folder / "bundle"


# --- who answers


class Peer:
    """Another runtime in a process of its own."""

    def __init__(self, command: list[Any]) -> None:
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError("a peer has ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make_peers(peers: Path, sizes: dict[str, int], folder: Path) -> dict[str, Peer]:
    """Convert a random checkpoint for each, and start it."""
    write_plain(folder / "plain", sizes)
    genai, openvino = peers / "genai/bin/python", peers / "openvino/bin/python"
    for command in (
        [genai, RUNNERS / "make_genai.py", folder / "plain", folder / "genai", "1"],
        [openvino, RUNNERS / "make_paged.py", folder / "plain", folder / "openvino"],
    ):
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (folder / "openvino/config.json").write_bytes((folder / "plain/config.json").read_bytes())
    return {
        "onnxruntime-genai": Peer([genai, RUNNERS / "run_genai.py", folder / "genai"]),
        "openvino-genai": Peer([openvino, RUNNERS / "run_openvino.py", folder / "openvino", "1"]),
    }


def ours(engine: Engine, mode: Any, block_length: int) -> Answer:
    """The engine in one mode."""

    def answer(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        options: dict[str, Any] = {} if mode == "ar" else {"block_length": block_length}
        wall, cpu = time.perf_counter(), time.process_time()
        handles = [
            engine.submit(ids, mode=mode, max_new_tokens=new_tokens, eos_token_ids=(), **options)
            for ids in prompts
        ]
        results = [handle.result() for handle in handles]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        nfe = sum(one.nfe for one in results)
        tokens = [one.token_ids for one in results]
        return {"wall_s": wall, "cpu_s": cpu, "nfe": nfe, "tokens": tokens}

    return answer


# --- the race


def prompts_of(model: TriModeModel, which: str) -> list[list[int]]:
    """Sixteen prompts of one length: questions of the demo, or random tokens."""
    if which != "demo":
        rng = random.Random(0)
        return [[rng.randrange(200, 30000) for _ in range(32)] for _ in range(max(ROWS))]
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for example in examples(5, "held-out"):
        ids = model.codec.encode_chat([{"role": "user", "content": example.prompt}])
        same = by_length[len(ids)]
        if ids not in same:
            same.append(ids)
        if len(same) == max(ROWS):
            return same
    raise AssertionError("examples have an end")


def race(
    ways: dict[str, Answer], prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Least processor seconds of each, in turns."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    order = random.Random(0)
    for turn in range(repeats + 1):
        for way in order.sample(list(ways), len(ways)):
            one = ways[way](prompts, new_tokens)
            assert all(len(tokens) == new_tokens for tokens in one.pop("tokens")), way
            if turn:  # the first warms up
                found[way].append(one)
    count = len(prompts) * new_tokens
    return {
        way: {
            "tokens_per_cpu_s": count / min(one["cpu_s"] for one in runs),
            "median_tokens_per_cpu_s": count / median([one["cpu_s"] for one in runs]),
            "tokens_per_forward": count / runs[0]["nfe"] if "nfe" in runs[0] else 1.0,
            "runs": runs,
        }
        for way, runs in found.items()
    }


def measured(model: TriModeModel, which: str) -> TriModeModel:
    """The model with timings, for `auto`."""
    lengths, repeats = ((1, 8, 32), 8) if which == "demo" else ((1, 8), 2)
    settings = check_settings(
        TimerSettings(lengths, (64,), ROWS, repeats), model.model, model.session
    )
    forwards = time_forwards(model.session, model.model, settings, lambda _: None)
    timings = table_of(model, 1, forwards)
    return TriModeModel(model.bundle, model.session, model.target, 1, timings)


def compared(which: str, bundle: Path, peers: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """All ways at every number of rows, on one shape."""
    block_length = 32 if which == "demo" else 8
    with ExitStack() as stack:
        opened = stack.enter_context(TriModeModel.from_pretrained(bundle, num_threads=1))
        model = measured(opened, which)
        config = json.loads(Path("artifacts/nld-tiny/config.json").read_text())
        sizes = SHAPE_120M if which == "120m" else {name: config[name] for name in SHAPE_120M}
        others = make_peers(peers, sizes, folder)
        for other in others.values():
            stack.callback(other.close)
        prompts, found = prompts_of(model, which), {}
        for rows in ROWS:
            with Engine(model, max_rows=rows, kv_bytes=0) as engine:
                ways: dict[str, Answer] = {
                    f"trimode {mode}": ours(engine, mode, block_length) for mode in MODES
                }
                result = race({**ways, **others}, prompts[:rows], NEW_TOKENS[which], repeats)
            found[rows] = result
            speeds = {way: round(one["tokens_per_cpu_s"], 1) for way, one in result.items()}
            print(which, rows, speeds, flush=True)
    return {"block_length": block_length, "prompt_tokens": len(prompts[0]), "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path, help="of the demo")
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"))
    parser.add_argument("--set-up", action="store_true", help="make the peers' environments")
    parser.add_argument("--only", choices=("demo", "120m"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.set_up:
        set_up(args.peers)
    results = {}
    for which in ("demo", "120m"):
        if args.only not in (None, which):
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bundle = args.bundle if which == "demo" else build_120m(folder)
            results[which] = compared(which, bundle, args.peers, folder, args.repeats)
        record = {"arguments": arguments_of(vars(args)), "packages": PACKAGES, **results}
        save("serving_peers" if args.only is None else f"serving_peers_{args.only}", record)


if __name__ == "__main__":
    main()
