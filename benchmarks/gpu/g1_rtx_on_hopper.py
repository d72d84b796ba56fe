"""G1: does TensorRT-RTX deserialize and run an engine on this GPU, and for which named target? Its
answers, in its words.

python -m benchmarks.gpu.g1_rtx_on_hopper [--device cpu]

Builds the demo checkpoint's `verify` graph for SM80, SM89, SM120, for CURRENT and with no target,
deserializes each, creates a context and runs one forward with weights uploaded, compared with ONNX
Runtime on the CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.common import arguments, save, show
from trimode.compiler.options import BuildOptions
from trimode.compiler.passes.base import lower, to_bytes
from trimode.compiler.passes.compute_type import ComputeType
from trimode.compiler.passes.static_capacity import StaticCacheCapacity
from trimode.compiler.passes.weights_to_inputs import WeightsToInputs
from trimode.compiler.pipeline import build_bundle
from trimode.graphs.checkpoint import describe_model, open_checkpoint
from trimode.graphs.decoder.trace import trace_graph
from trimode.runtime import TriModeModel
from trimode.runtime.bundle.open import open_bundle
from trimode.runtime.sessions.tensorrt.library import make_logger

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
CHOICES = ("SM80", "SM89", "SM120", "CURRENT", None)
BLOCK = np.array([[1, 10, 15, 20, 25, 30, 35, 40]])


def lowered_verify() -> bytes:
    checkpoint = open_checkpoint(DEMO)
    model = describe_model(checkpoint)
    graph = trace_graph("verify", checkpoint.config, model, checkpoint.drafter)
    return to_bytes(
        lower(
            graph,
            StaticCacheCapacity(model.num_positions),
            ComputeType("float16"),
            WeightsToInputs(),
        )
    )


def build(trt: Any, logger: Any, graph: bytes, choice: str | None) -> Any:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(graph)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if -1 in shape:
            profile.set_shape(
                tensor.name,
                *[
                    tuple(
                        (1 if axis == 0 else 8) if size == -1 else size
                        for axis, size in enumerate(shape)
                    )
                ]
                * 3,
            )
    config.add_optimization_profile(profile)
    if choice is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, choice), 0)
    return builder.build_serialized_network(network, config)


def run_through_session(folder: Path, choice: str, capability: str) -> str:
    """The whole session on an engine that was named for another architecture; the largest
    difference of a logit from the CPU's.
    """
    target = f"sm{choice.removeprefix('SM')}"
    build_bundle(
        DEMO,
        folder / target,
        BuildOptions(targets=(target, "cpu"), precision="fp16", block_lengths=(8,)),
    )
    bundle = open_bundle(folder / target)
    from trimode.runtime.sessions.tensorrt.session import TensorRTSession

    record = bundle.chosen.targets[target].model_copy(update={"compute_capability": capability})
    session, wide = (
        TensorRTSession(bundle, record),
        TriModeModel.from_pretrained(folder / target, target="cpu"),
    )
    cache, other = session.new_cache(), wide.session.new_cache()
    found = np.asarray(session.run("verify", cache, BLOCK, 0)[2])
    expected = np.asarray(wide.session.run("verify", other, BLOCK, 0)[2])
    same = (found.argmax(-1) == expected.argmax(-1)).mean()
    return (
        f"ran: largest logit error {np.abs(found - expected).max():.4g} of "
        f"{np.abs(expected).max():.4g}, {same:.0%} of the greedy ids equal"
    )


def try_one(
    trt: Any, graph: bytes, choice: str | None, capability: str | None, folder: Path
) -> dict[str, Any]:
    logger = make_logger(trt)
    engine = build(trt, logger, graph, choice)
    answer: dict[str, Any] = {
        "target": choice or "none named",
        "built_bytes": engine.nbytes if engine is not None else None,
    }
    if engine is None:
        return {**answer, "answer": "; ".join(logger.errors)}
    logger.errors.clear()
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    answer |= {"deserialized": loaded is not None, "messages": list(logger.errors)}
    if loaded is None:
        return {
            **answer,
            "answer": logger.errors[-1] if logger.errors else "None, without a message",
        }
    answer["context"] = loaded.create_execution_context() is not None
    if choice in ("SM80", "SM89", "SM120") and capability:
        try:
            return {**answer, "answer": run_through_session(folder, choice, capability)}
        except Exception as error:  # whatever it says is the answer
            return {**answer, "answer": f"{type(error).__name__}: {error}"}
    return {**answer, "answer": f"deserialized, context {answer['context']}"}


def main() -> None:
    arguments(__doc__).parse_args()
    import tensorrt_rtx as trt

    from trimode.runtime.sessions.gpu import Gpu, find_gpu

    gpu = find_gpu()
    capability = gpu.compute_capability if isinstance(gpu, Gpu) else None
    graph = lowered_verify()
    with tempfile.TemporaryDirectory() as name:
        answers = [try_one(trt, graph, choice, capability, Path(name)) for choice in CHOICES]
    save(
        "g1_rtx_on_hopper",
        {"tensorrt_rtx": trt.__version__, "compute_capability": capability, "answers": answers},
    )
    for row in answers:
        row["answer"] = row["answer"][:160]
    show(answers, ("target", "built_bytes", "deserialized", "answer"))


if __name__ == "__main__":
    main()
