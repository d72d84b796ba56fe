"""Traces the learned sampler into an ONNX graph with its weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file

from trimode.errors import CheckpointError
from trimode.formats.contract import TensorSpec, sampler_contract
from trimode.formats.hints import TRAIN_SAMPLER
from trimode.formats.sampler import RECORD, WEIGHTS, SamplerFile
from trimode.graphs.decoder.attention import OPSET
from trimode.graphs.decoder.trace import clean, declare, quiet_exporter
from trimode.graphs.sampler.network import BlockSampler, SamplerShape

_EXAMPLE_SIZES = {"batch": 2, "rows": 5}


def load_sampler(folder: Path, record: SamplerFile) -> BlockSampler:
    """Load the network of a trained sampler on the CPU.

    Raises:
        CheckpointError: the weights are not of the sizes that the record names.
    """
    sampler = BlockSampler(SamplerShape(**record.shape.model_dump()), record.vocab_size)
    try:
        sampler.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        found = str(error).splitlines()[-1].strip()
        hint = TRAIN_SAMPLER
        raise CheckpointError(
            f"{folder / WEIGHTS}: expected the tensors that {RECORD} describes, "
            f"found others: {found}",
            hint,
        ) from error
    return sampler.eval().requires_grad_(False)


def trace_sampler(sampler: BlockSampler) -> ir.Model:
    """Trace a network with its standardisation and features.

    The graph takes blocks of any number and length.
    """
    inputs, outputs = sampler_contract()
    dims = {name: torch.export.Dim(name, min=1) for name in _EXAMPLE_SIZES}

    def example(spec: TensorSpec) -> torch.Tensor:
        return torch.ones(
            [_EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.shape],
            dtype=getattr(torch, spec.dtype),
        )

    shapes = tuple(
        {axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in inputs
    )
    with quiet_exporter(), torch.no_grad():
        exported = torch.export.export(
            sampler, tuple(example(spec) for spec in inputs), strict=False, dynamic_shapes=shapes
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
        )
        assert program is not None
        clean(program.model, "sampler")
    declare(program.model.graph.inputs, inputs)
    declare(program.model.graph.outputs, outputs)
    return program.model
