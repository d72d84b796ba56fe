"""G2: TensorRT-RTX on this GPU: parity with the CPU on the demo checkpoint, then milliseconds a forward, weights as inputs against baked.

python -m benchmarks.gpu.g2_rtx_speed --target sm89 [--size 8b] [--placements shared,baked]
python -m benchmarks.gpu.g2_rtx_speed --device cpu --size tiny        builds, and stops where a GPU is needed

`--target` is an architecture whose engines this GPU accepts (what G1 found); the session's check of the compute capability is told so.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import PASTS, TINY, arguments, save, show, write_random_checkpoint
from benchmarks.gpu.sessions import compare_sessions, forward_times
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.errors import DeviceError
from trimode.runtime import TriModeModel
from trimode.runtime.bundle import Bundle, open_bundle
from trimode.runtime.device import Gpu, find_gpu
from trimode.runtime.tensorrt_session import TensorRTSession

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"


def accepted_here(bundle: Bundle, target: str) -> TensorRTSession:
    """The session of a target, as if it had been built for the GPU that is here."""
    gpu = find_gpu()
    record = bundle.chosen.targets[target]
    if isinstance(gpu, Gpu):
        record = record.model_copy(update={"compute_capability": gpu.compute_capability})
    return TensorRTSession(bundle, record)


def parity(folder: Path, target: str) -> dict[str, Any]:
    build_bundle(DEMO, folder, BuildOptions(targets=(target, "cpu"), precision="fp16"))
    model = TriModeModel.from_pretrained(folder, target="cpu")
    session = accepted_here(open_bundle(folder), target)
    result = compare_sessions(session, model.session, model.model.vocab_size, 32)
    ours = TriModeModel(model.bundle, session, target)
    prompt = [[1, 10, 15, 20]]
    tokens = {name: m.linear_spec_generate(prompt, max_new_tokens=64)[0].tolist() for name, m in (("gpu", ours), ("cpu", model))}
    result["tokens_equal"] = tokens["gpu"] == tokens["cpu"]
    session.close()
    return result


def speed(checkpoint: Path, folder: Path, target: str, placement: str, pasts: tuple[int, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    options = BuildOptions(targets=(target,), precision="bf16", weights=placement, max_length=max(pasts) + 128, block_lengths=(8, 16, 32))  # type: ignore[arg-type]
    bundle = build_bundle(checkpoint, folder, options)
    built = time.perf_counter() - start
    engines = [bundle.manifest.files[engine.file].num_bytes for engine in bundle.record.targets[target].graphs.values()]
    result: dict[str, Any] = {"placement": placement, "build_s": built, "engine_bytes": engines}
    start = time.perf_counter()
    session = accepted_here(open_bundle(folder, verify=False), target)
    result["open_s"] = time.perf_counter() - start
    result["cells"] = forward_times(session, pasts, 20)
    session.close()
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--placements", default="shared,baked")
    options = parser.parse_args()
    pasts = (64,) if options.size == TINY else PASTS
    measured: dict[str, Any] = {"target": options.target, "size": options.size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            measured["parity"] = parity(folder / "demo", options.target)
            write_random_checkpoint(folder / "checkpoint", options.size)
            measured["speed"] = [speed(folder / "checkpoint", folder / p, options.target, p, pasts) for p in options.placements.split(",")]
        except DeviceError as error:
            measured["stopped"] = error.message
    save("g2_rtx_speed", measured)
    print(measured.get("parity") or measured["stopped"])
    rows = [{"placement": s["placement"], **cell} for s in measured.get("speed", []) for cell in s["cells"]]
    if rows:
        show(rows, ("placement", "graph", "rows", "past", "ms"))


if __name__ == "__main__":
    main()
