"""G3: ONNX Runtime's CUDA provider: which operators of opset 24 run on the GPU and which fall back,
parity, and milliseconds a forward.

python -m benchmarks.gpu.g3_ort_cuda [--size 8b] [--precision fp16]
python -m benchmarks.gpu.g3_ort_cuda --device cpu --size tiny

Needs onnxruntime-gpu 1.31 or newer. On a CPU the same is done with the CPU provider.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.gpu.common import PASTS, TINY, arguments, save, show, write_random_checkpoint
from benchmarks.gpu.sessions import compare_sessions, forward_times
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.runtime import TriModeModel

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"


def placements(bundle: Path, target: str) -> dict[str, dict[str, int]]:
    """Nodes of the `verify` graph by provider and operator, from ONNX Runtime's own profile of one
    run.
    """
    model = TriModeModel.from_pretrained(bundle, target=target)
    path = bundle / model.bundle.chosen.targets[target].graphs["verify"].file
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(bundle / "profile")
    providers = (
        ["CUDAExecutionProvider", "CPUExecutionProvider"]
        if target == "cuda"
        else ["CPUExecutionProvider"]
    )
    session = model.session
    profiled = ort.InferenceSession(path, options, providers=providers)
    session.sessions["verify"] = profiled  # type: ignore[attr-defined]
    import numpy as np

    session.run("verify", session.new_cache(), np.full((1, 8), 5), 16)
    events = json.loads(Path(profiled.end_profiling()).read_text())
    counts: dict[str, Counter[str]] = {}
    for event in events:
        arguments_of = event.get("args", {})
        if event.get("name", "").endswith("_kernel_time"):
            counts.setdefault(arguments_of.get("provider", "?"), Counter())[
                arguments_of.get("op_name", "?")
            ] += 1
    return {provider: dict(ops) for provider, ops in counts.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precision", default="fp16", choices=("fp16", "bf16"))
    options = parser.parse_args()
    target = options.device
    pasts, repeats = ((64,), 3) if options.size == TINY else (PASTS, 20)
    measured: dict[str, Any] = {
        "size": options.size,
        "precision": options.precision,
        "providers": ort.get_available_providers(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_bundle(
            DEMO,
            folder / "demo",
            BuildOptions(targets=tuple({target: 0, "cpu": 0}), precision=options.precision),
        )
        measured["nodes_by_provider"] = placements(folder / "demo", target)
        with (
            TriModeModel.from_pretrained(folder / "demo", target=target) as ours,
            TriModeModel.from_pretrained(folder / "demo", target="portable") as wide,
        ):
            measured["parity"] = compare_sessions(
                ours.session, wide.session, ours.model.vocab_size, 32
            )
        write_random_checkpoint(folder / "checkpoint", options.size)
        build_bundle(
            folder / "checkpoint",
            folder / "large",
            BuildOptions(
                targets=(target,), precision=options.precision, max_length=max(pasts) + 128
            ),
        )
        with TriModeModel.from_pretrained(folder / "large", target=target, verify=False) as large:
            measured["cells"] = forward_times(large.session, pasts, repeats)
    save(f"g3_ort_{target}_{options.precision}", measured)
    print(json.dumps(measured["nodes_by_provider"]))
    print(measured["parity"])
    show(measured["cells"], ("graph", "rows", "past", "ms"))


if __name__ == "__main__":
    main()
