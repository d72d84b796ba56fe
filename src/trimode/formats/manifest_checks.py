"""Finds contradictions inside of a manifest.

The form of each field is checked when a manifest is read. Here are the rules that tie fields to
each other: names that lead nowhere, sizes that cannot be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from trimode.formats.contract import GraphContract, GraphName, ModelInfo, graph_contract
from trimode.formats.manifest import (
    Manifest,
    PrecisionName,
    PrecisionRecord,
    ProfileRecord,
    TargetRecord,
)

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "block_size",
    "max_length",
    "max_block_length",
)

_DENSE: tuple[PrecisionName, ...] = ("fp32", "fp16", "bf16")


def contradiction(manifest: Manifest) -> str | None:
    """Describe the first contradiction; None where there is none."""
    return next(contradictions(manifest), None)


def contradictions(manifest: Manifest) -> Iterator[str]:
    """Describe every contradiction in one line each."""
    yield from _of_model(manifest.model)
    for graph_name, contract in manifest.contracts.items():
        yield from _of_contract(graph_name, contract, manifest.model)
    for name, precision in manifest.precisions.items():
        for what in _of_precision(precision, manifest, is_quantized=name not in _DENSE):
            yield f"precision {name}: {what}"
    if manifest.sampler is not None:
        yield from _missing(manifest, "sampler", [manifest.sampler.file])


def _of_model(model: ModelInfo) -> Iterator[str]:
    for name in _POSITIVE:
        if (value := getattr(model, name)) < 1:
            yield f"expected model.{name} of at least 1, found {value}"
            return
    if model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"expected model.num_attention_heads to be a multiple of {model.num_key_value_heads}, "
            f"the key/value heads, found {model.num_attention_heads}"
        )
    if model.block_size > model.max_block_length:
        yield (
            f"expected model.block_size up to {model.max_block_length}, "
            f"model.max_block_length, found {model.block_size}"
        )
    for token in (model.mask_token_id, model.bos_token_id, *model.eos_token_ids):
        if token is not None and not 0 <= token < model.vocab_size:
            yield (
                f"expected special tokens of the model from 0 to {model.vocab_size - 1}, "
                f"found {token}"
            )


def _of_contract(graph_name: GraphName, contract: GraphContract, model: ModelInfo) -> Iterator[str]:
    if contract.graph_name != graph_name:
        yield f"expected the contract of {graph_name}, found that of {contract.graph_name}"
        return
    expected = graph_contract(graph_name, model)
    for part in ("attention", "inputs", "outputs"):
        if getattr(contract, part) != getattr(expected, part):
            wanted = f"expected the {part} of this schema and model"
            yield f"contract {graph_name}: {wanted}, found others"


def _of_precision(
    record: PrecisionRecord, manifest: Manifest, *, is_quantized: bool
) -> Iterator[str]:
    if is_quantized != (record.calibration is not None):
        expected = ("no calibration", "a calibration")
        yield f"expected {expected[is_quantized]}, found {expected[not is_quantized]}"
    yield from _missing(manifest, "packs", record.packs)
    yield from _of_graphs(manifest, "graphs", record.graphs)
    size = sum(manifest.files[name].num_bytes for name in record.packs if name in manifest.files)
    if record.weight_bytes > size:
        yield f"expected packs of at least {record.weight_bytes} bytes, found {size}"
    for name, target in record.targets.items():
        for what in _of_target(target, record, manifest):
            yield f"target {name}: {what}"


def _of_target(target: TargetRecord, record: PrecisionRecord, manifest: Manifest) -> Iterator[str]:
    files = {graph_name: engine.file for graph_name, engine in target.graphs.items()}
    for one in target.by_capacity():
        yield from _of_capacity(one, manifest)
    if target.placement == "external" and not _are_over_the_pack(target, files, record):
        if target.revision is None:
            yield "expected the portable graphs of the precision, found others"
        else:
            yield "expected graphs that only this target has, found others"
    if target.smaller:
        yield from _of_lengths(target, manifest.model.max_length)


def _are_over_the_pack(
    target: TargetRecord, files: dict[GraphName, str], record: PrecisionRecord
) -> bool:
    """Tell whether a target's graphs are the portable ones, or its own.

    Its own are as many, and no other target or precision has them.
    """
    if target.revision is None:
        return files == record.graphs
    others = {
        engine.file
        for other in record.targets.values()
        if other != target
        for engine in other.engines
    }
    own = set(files.values())
    return len(own) == len(files) and not own & {*record.graphs.values(), *others}


def _of_capacity(target: TargetRecord, manifest: Manifest) -> Iterator[str]:
    files = {graph_name: engine.file for graph_name, engine in target.graphs.items()}
    yield from _of_graphs(manifest, "graphs", files)
    if target.backend != "onnxruntime":
        yield from _of_engines(target)
    for graph_name, engine in target.graphs.items():
        for profile in engine.profiles:
            yield from (f"{graph_name}: {what}" for what in _of_profile(profile))


def _of_lengths(target: TargetRecord, max_length: int) -> Iterator[str]:
    lengths = [*(one.max_length for one in target.smaller), max_length]
    slots = [*(one.capacity for one in target.smaller), target.capacity or 0]
    for what, found in (("lengths", lengths), ("capacities", slots)):
        if found != sorted(set(found)):
            yield f"expected {what} of text that ascend, found {', '.join(map(str, found))}"
    for length, capacity in zip(lengths, slots, strict=True):
        if capacity < length:
            yield f"expected a capacity for texts of {length} tokens, found {capacity} slots"


def _of_engines(target: TargetRecord) -> Iterator[str]:
    if target.device != "cuda" or target.compute_capability is None:
        yield (
            f"expected engines of {target.backend} on cuda with a compute capability, "
            f"found {target.device} and {target.compute_capability}"
        )
    if target.capacity is None or target.capacity < 1:
        yield f"expected engines with a capacity of at least 1, found {target.capacity}"


def _of_profile(profile: ProfileRecord) -> Iterator[str]:
    for name, (least, usual, most) in (("batch", profile.batch), ("rows", profile.rows)):
        if not 1 <= least <= usual <= most:
            yield f"expected {name} as least, usual and most, found {least}, {usual}, {most}"


def _of_graphs(manifest: Manifest, what: str, files: Mapping[GraphName, str]) -> Iterator[str]:
    if files.keys() != manifest.contracts.keys():
        yield (
            f"expected {what} of {', '.join(manifest.contracts)}, "
            f"found {', '.join(files) or 'none'}"
        )
    yield from _missing(manifest, what, files.values())


def _missing(manifest: Manifest, what: str, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name not in manifest.files:
            yield f"expected {what} among the files of the manifest, found {name}, which is not"
