"""Describes the bundle in its manifest."""

from __future__ import annotations

import trimode
from trimode.compiler.additions import drop_targets
from trimode.compiler.stages.state import Addition, BuildState, NewBundle
from trimode.compiler.store.fingerprint import LIBRARIES
from trimode.formats.contract import graph_contract
from trimode.formats.manifest import SCHEMA_VERSION, Manifest, PrecisionRecord, SourceRecord
from trimode.formats.texts import name_of
from trimode.formats.versions import versions
from trimode.graphs.identity import stamp_of


def describe_bundle(state: NewBundle) -> None:
    """Make the manifest of a new bundle."""
    plan, checkpoint = state.plan, state.plan.checkpoint
    state.manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        trimode_version=trimode.__version__,
        model=plan.model,
        source=SourceRecord(
            name=name_of(checkpoint.path),
            sha256=state.source.hexdigest(),
            stamp=stamp_of(checkpoint),
            num_parameters=sum(
                tensor.num_elements
                for name, tensor in state.tensors.items()
                if name in checkpoint.tensors
            ),
        ),
        dtype=plan.dtype,
        contracts={
            graph_name: graph_contract(graph_name, plan.model) for graph_name in plan.graph_names
        },
        precisions={plan.precision: _describe_precision(state)},
        files=state.files,
        libraries=versions(LIBRARIES),
        sampler=plan.sampler.describe() if plan.sampler else None,
    )


def describe_additions(state: Addition) -> None:
    """Make the manifest of a bundle with its additions.

    These are a new precision, new targets of one, or a sampler.
    """
    precision = state.plan.precision
    rest = drop_targets(state.base, precision, list(state.plan.targets))
    there = rest.precisions.get(precision)
    record = (
        there.model_copy(update={"targets": {**there.targets, **state.plan.records}})
        if there
        else _describe_precision(state)
    )
    sampler = state.plan.sampler.describe() if state.plan.sampler else rest.sampler
    update = {
        "precisions": {**rest.precisions, precision: record},
        "files": {**rest.files, **state.files},
        "sampler": sampler,
    }
    state.manifest = rest.model_copy(update=update)


def _describe_precision(state: BuildState) -> PrecisionRecord:
    plan = state.plan
    return PrecisionRecord(
        calibration=plan.quantization.record if plan.quantization else None,
        packs=tuple(path.name for path in state.packs),
        weight_bytes=sum(tensor.num_bytes for tensor in state.tensors.values()),
        graphs={graph_name: plan.names.graph(graph_name) for graph_name in plan.graph_names},
        targets=plan.records,
    )
