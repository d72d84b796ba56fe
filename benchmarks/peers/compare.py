"""Decoding on the CPU beside other runtimes: the same shape, machine and threads, in turns.

    python -m benchmarks.peers.compare --shape 120m --bits 4 [--threads 1] [--rounds 3]

Sets up each peer in an environment of its own (``--home``), makes a model of random weights for
each (``--work``), and runs one after the other, round after round; the least of each counts. Times
are of the clock and of the processor: on a machine that others use the second says more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save
from benchmarks.peers.environments import prepare, python_of, variables_of
from benchmarks.peers.shapes import SHAPES, write_llama, write_trimode

PEERS = ("trimode", "llamacpp", "genai", "openvino")
ROWS = (1, 8, 16, 32)
ACCEPTED = 6.8
"""Tokens of a cycle of linear self-speculation, as published for the family."""
RUNNERS = Path(__file__).parent / "runners"
TOKENIZER = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
Sizes = dict[str, Any]


def build_command(peer: str, home: Path, work: Path, bits: int) -> list[str]:
    """The command that makes a peer's model of the checkpoint."""
    python, output = str(python_of(home, peer)), str(work / f"{peer}-{bits}")
    source = str(work / ("trimode" if peer == "trimode" else "llama"))
    if peer == "trimode":
        int4 = ["int4", "--calibration", "rtn", "--quantize-head"]
        chosen = ["--precision", *(int4 if bits == 4 else ["fp32"])]
        return [python, "-m", "trimode.cli.main", "build", source, "-o", output, *chosen]
    if peer == "genai":
        kind = ["int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]
        chosen = kind if bits == 4 else ["fp32", "-e", "cpu"]
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-m", source]
        return [*builder, "-o", output, "-p", *chosen]
    script = RUNNERS / {"llamacpp": "make_gguf.py", "openvino": "make_openvino.py"}[peer]
    narrow = {"llamacpp": "q4_0", "openvino": "int4"}[peer]
    return [python, str(script), source, output, narrow if bits == 4 else "f32"]


def build(peer: str, home: Path, work: Path, bits: int) -> Sizes:
    """Make a peer's model; seconds, peak memory and bytes."""
    output = work / f"{peer}-{bits}"
    if not output.exists():
        begun = time.perf_counter()
        process = subprocess.Popen(
            build_command(peer, home, work, bits),
            env=variables_of(home, peer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{peer}: building the model failed")
        found = {
            "build_s": time.perf_counter() - begun,
            "build_cpu_s": usage.ru_utime + usage.ru_stime,
            "build_peak_bytes": usage.ru_maxrss * 1024,
        }
        (work / f"{peer}-{bits}.json").write_text(json.dumps(found))
    files = [output] if output.is_file() else [*output.rglob("*")]
    size = sum(path.stat().st_size for path in files if path.is_file())
    note = work / f"{peer}-{bits}.json"  # not there where another command made the model
    return {**(json.loads(note.read_text()) if note.exists() else {}), "bytes": size}


def measure(peer: str, home: Path, wanted: Sizes) -> Sizes:
    """One process: load, prefill, and forwards of several rows."""
    command = [str(python_of(home, peer)), str(RUNNERS / f"run_{peer}.py"), json.dumps(wanted)]
    done = subprocess.run(
        command, env=variables_of(home, peer), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def least(old: Sizes | None, new: Sizes) -> Sizes:
    """The lesser of each number, at any depth."""
    if old is None:
        return new
    return {
        name: least(old[name], value) if isinstance(value, dict) else min(old[name], value)
        for name, value in new.items()
    }


def summary(found: dict[str, Sizes], clock: str) -> list[str]:
    """Lines of a table in Markdown, and what speculation makes of the forwards."""
    lines = ["| runtime | 1 row, ms | 8 rows | 16 rows | 32 rows | prefill, ms | bytes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for peer, one in found.items():
        rows = [one["rows"][str(count)][clock] for count in ROWS]
        times = " | ".join(f"{value / rows[0]:.2f} x" for value in rows[1:])
        prefill, size = one["prefill"][clock], one["bytes"] / 1e6
        lines.append(f"| {peer} | {rows[0]:.1f} | {times} | {prefill:.0f} | {size:.0f} MB |")
    best = min(one["rows"]["1"][clock] for peer, one in found.items() if peer != "trimode")
    ours = found["trimode"]["rows"]
    lines.append(f"AR over the best peer's: {best / ours['1'][clock]:.2f}")
    for count in ROWS[1:]:
        cycle = 2 * ours[str(count)][clock]  # a draft costs what a verification costs
        lines.append(f"speculation, blocks of {count}: {ACCEPTED * best / cycle:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="120m")
    parser.add_argument("--bits", type=int, choices=(4, 32), default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--home", type=Path, default=Path("/tmp/peers"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/peers-models"))
    args = parser.parse_args()
    peers, shape = tuple(args.peers.split(",")), SHAPES[args.shape]
    work = args.work / args.shape
    prepare(args.home, peers)
    write_sources(work, args.shape)
    sizes = {peer: build(peer, args.home, work, args.bits) for peer in peers}
    found: dict[str, Sizes] = {}
    for _ in range(args.rounds):
        for peer in peers:
            wanted = {
                "model": str(work / f"{peer}-{args.bits}"),
                "vocab": shape.vocab,
                "rows": ROWS,
                "threads": args.threads,
                "past": args.past,
                "repeats": args.repeats,
                "kv": "f32",
            }
            found[peer] = least(found.get(peer), measure(peer, args.home, wanted))
    found = {peer: {**one, **sizes[peer]} for peer, one in found.items()}
    tables = {clock: summary(found, clock) for clock in ("cpu_ms", "ms")}
    print("\n".join(line for table in tables.values() for line in (*table, "")))
    (RESULTS / "peers").mkdir(exist_ok=True)
    arguments = {"shape": args.shape, "bits": args.bits, "threads": args.threads}
    options = " ".join(f"--{name} {value}" for name, value in arguments.items())
    save(
        f"peers/{args.shape}_{args.bits}bits_{args.threads}threads",
        {
            "command": f"python -m benchmarks.peers.compare {options}",
            "past": args.past,
            "rounds": args.rounds,
            "load_average": os.getloadavg(),
            "results": found,
            "tables": tables,
        },
    )


def write_sources(work: Path, name: str) -> None:
    """Write the checkpoints that are not there."""
    shape = SHAPES[name]
    if not (work / "llama").exists():
        write_llama(work / "llama", shape)
        for file in TOKENIZER.glob("tokenizer*.json"):
            shutil.copy(file, work / "llama")
    if not (work / "trimode").exists():
        write_trimode(work / "trimode", shape)


if __name__ == "__main__":
    main()
