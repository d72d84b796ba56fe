"""G2: TensorRT-RTX on this GPU: parity with the CPU on the demo checkpoint, then milliseconds a
forward, weights as inputs against baked.

python -m benchmarks.gpu.g2_rtx_speed --target sm89 [--size 8b] [--kinds bf16,bf16-baked,fp8,int4]
python -m benchmarks.gpu.g2_rtx_speed --device cpu --size tiny     builds, then needs a GPU

`--target` is an architecture whose engines this GPU accepts (what G1 found); the session's check of
the compute capability is told so.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

import trimode
from benchmarks.gpu.common import PASTS, TINY, arguments, save, show, write_random_checkpoint
from benchmarks.gpu.sessions import compare_sessions, forward_times
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.errors import DeviceError
from trimode.formats.calibration import SCHEMA_VERSION, Calibration, Scales, save_calibration
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest
from trimode.runtime import TriModeModel
from trimode.runtime.bundle.open import Bundle, open_bundle
from trimode.runtime.sessions.gpu import Gpu, find_gpu
from trimode.runtime.sessions.tensorrt.session import TensorRTSession

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"


def accepted_here(bundle: Bundle, target: str) -> TensorRTSession:
    """The session of a target, as if it had been built for the GPU that is here."""
    gpu = find_gpu()
    record = bundle.chosen.targets[target]
    if isinstance(gpu, Gpu):
        record = record.model_copy(update={"compute_capability": gpu.compute_capability})
    return TensorRTSession(bundle, record)


def parity(folder: Path, target: str, precision: str) -> dict[str, Any]:
    """The demo on this GPU against the portable graphs of the same bundle: graphs, and the tokens
    of self-speculation.
    """
    build_bundle(
        DEMO,
        folder,
        BuildOptions(
            targets=(target, "cpu"),
            precision=precision,
            calibration=calibration_for(DEMO, folder, precision),
        ),
    )
    model = TriModeModel.from_pretrained(folder, target="cpu")
    session = accepted_here(open_bundle(folder), target)
    result = compare_sessions(session, model.session, model.model.vocab_size, 32)
    ours = TriModeModel(model.bundle, session, target)
    prompt = [[1, 10, 15, 20]]
    tokens = {
        name: m.linear_spec_generate(prompt, max_new_tokens=64)[0].tolist()
        for name, m in (("gpu", ours), ("cpu", model))
    }
    result["tokens_equal"] = tokens["gpu"] == tokens["cpu"]
    session.close()
    return result


def calibration_for(checkpoint: Path, folder: Path, precision: str) -> Path | Literal["rtn"] | None:
    """fp8: one scale for all layers, which is enough to measure time, and for random weights of one
    size; int4 and int8: rounded to nearest.
    """
    if precision not in ("fp8", "int8", "int4"):
        return None
    return (
        flat_calibration(checkpoint, folder.with_name(f"{folder.name}-calibration"))
        if precision == "fp8"
        else "rtn"
    )


def flat_calibration(checkpoint: Path, folder: Path) -> Path:
    """A calibration in fp8 whose every weight reaches 0.5 and every input 16."""
    opened = open_checkpoint(checkpoint)
    digest = SourceDigest(opened)
    for _ in digest.read_all():
        pass
    scales: Scales = {}
    for name, entry in opened.tensors.items():
        if len(entry.shape) == 2 and "layers" in name and "lora" not in name:
            layer = name.removesuffix(".weight")
            scales |= {
                f"{layer}.weight_amax": np.array(0.5, np.float32),
                f"{layer}.input_amax": np.array(16, np.float32),
            }
    record = Calibration(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        precision="fp8",
        algorithm="flat",
        block_size=None,
        source_name=checkpoint.name,
        source_sha256=digest.base_hexdigest(),
        scales_sha256="",
        data=None,
        layers={},
        libraries={},
    )
    save_calibration(folder, record, scales)
    return folder


def speed(
    checkpoint: Path, folder: Path, target: str, kind: str, pasts: tuple[int, ...]
) -> dict[str, Any]:
    precision, _, placement = kind.partition("-")
    options = BuildOptions(
        targets=(target,),
        precision=precision,
        calibration=calibration_for(checkpoint, folder, precision),
        weights=placement or "shared",
        max_length=max(pasts) + 128,
        block_lengths=(8, 16, 32),  # type: ignore[arg-type]
    )
    start = time.perf_counter()
    bundle = build_bundle(checkpoint, folder, options)
    built = time.perf_counter() - start
    engines = [
        bundle.manifest.files[engine.file].num_bytes
        for engine in bundle.record.targets[target].graphs.values()
    ]
    result: dict[str, Any] = {"kind": kind, "build_s": built, "engine_bytes": engines}
    start = time.perf_counter()
    session = accepted_here(open_bundle(folder, verify=False), target)
    result["open_s"] = time.perf_counter() - start
    result["cells"] = forward_times(session, pasts, 20)
    session.close()
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--target", default="sm89")
    parser.add_argument(
        "--kinds", default="bf16,bf16-baked,fp8,int4", help="precision, or precision-baked"
    )
    parser.add_argument(
        "--parity",
        default="fp16,int8,int4",
        help="precisions of the demo that are compared with the CPU",
    )
    options = parser.parse_args()
    pasts = (64,) if options.size == TINY else PASTS
    measured: dict[str, Any] = {"target": options.target, "size": options.size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            measured["parity"] = {
                p: parity(folder / f"demo-{p}", options.target, p)
                for p in options.parity.split(",")
            }
            write_random_checkpoint(folder / "checkpoint", options.size)
            measured["speed"] = []
            for kind in options.kinds.split(","):
                measured["speed"].append(
                    speed(folder / "checkpoint", folder / kind, options.target, kind, pasts)
                )
                shutil.rmtree(folder / kind)  # a bundle is as large as the checkpoint
        except DeviceError as error:
            measured["stopped"] = error.message
    save("g2_rtx_speed", measured)
    print(measured.get("parity") or measured["stopped"])
    rows = [{"kind": s["kind"], **cell} for s in measured.get("speed", []) for cell in s["cells"]]
    if rows:
        show(rows, ("kind", "graph", "rows", "past", "ms"))


if __name__ == "__main__":
    main()
