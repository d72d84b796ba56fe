"""Plans what ONNX Runtime runs, and names the files of a precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimode.compiler.store.fingerprint import lowering_revision
from trimode.compiler.targets import Precision, Target
from trimode.compiler.toolchain import library_of
from trimode.formats.contract import DType, GraphName
from trimode.formats.manifest import EngineRecord, TargetRecord

Int4Inputs = Literal["float32", "int8"]


@dataclass(frozen=True)
class FileNames:
    """Names the files of a precision in the bundle.

    ``suffix`` is empty for the precision that was built first.
    """

    suffix: str = ""

    @property
    def pack(self) -> str:
        """The weights."""
        return f"weights{self.suffix}.safetensors"

    def graph(self, graph_name: GraphName) -> str:
        """A portable graph."""
        return f"{graph_name}{self.suffix}.onnx"

    def cpu_graph(self, graph_name: GraphName) -> str:
        """Return the name of a graph for the CPU.

        It lies beside the packs, whose data it reads.
        """
        return f"{graph_name}{self.suffix}.cpu.onnx"

    def target(self, name: str) -> str:
        """The folder of a target's engines or graphs."""
        return f"engines/{name}{self.suffix}"


def plan_onnxruntime(
    target: Target,
    dtype: DType,
    names: FileNames,
    graph_names: tuple[GraphName, ...],
    *,
    is_quantized: bool,
) -> TargetRecord:
    """Plan a target of ONNX Runtime.

    On a CPU everything is computed in float32.

    A pack of float32, or of quantized weights, is mapped; any other is widened once, on loading.
    """
    mapped = target.device == "cpu" and (dtype == "float32" or is_quantized)
    return TargetRecord(
        backend="onnxruntime",
        device=target.device,
        compute_capability=None,
        compute_dtype="float32" if target.device == "cpu" else dtype,
        placement="external" if mapped else "shared",
        capacity=None,
        workspace_mib=None,
        library=library_of("onnxruntime"),
        revision=lowering_revision(),
        graphs={
            graph_name: EngineRecord(
                file=names.cpu_graph(graph_name)
                if mapped
                else f"{names.target(target.name)}/{graph_name}.onnx"
            )
            for graph_name in graph_names
        },
    )


def int4_inputs_of(target: Target, precision: Precision, *, exact: bool) -> Int4Inputs | None:
    """Type of what a target of ONNX Runtime multiplies with int4 weights."""
    if target.backend != "onnxruntime" or precision != "int4":
        return None
    return "float32" if exact else "int8"
