"""Implements ``trimode inspect``: shows a bundle's contents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimode.cli.options.shared import BundlePath, Json
from trimode.errors import UsageError

if TYPE_CHECKING:
    from trimode.formats.contract import ModelInfo
    from trimode.formats.manifest import (
        CalibrationRecord,
        Manifest,
        PrecisionName,
        PrecisionRecord,
        ProfileRecord,
        TargetRecord,
    )


def inspect(
    bundle: BundlePath,
    *,
    plans: Annotated[
        bool,
        typer.Option(
            "--plans",
            help="Show the memory traffic of a forward, for each TensorRT-RTX engine; with "
            "--target cpu, what ONNX Runtime packs and what it rearranges.",
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Target that --plans shows; default: all with engines."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a bundle holds: model, graphs, files, sizes, versions."""
    if target is not None and not plans:
        raise UsageError(
            "expected --target with --plans, found it alone", "add --plans, or leave --target out"
        )
    if plans:
        from trimode.cli.plans import inspect_plans

        inspect_plans(bundle, target, as_json=as_json)
        return

    inspect_bundle(bundle, as_json=as_json)


def inspect_bundle(path: Path, *, as_json: bool) -> None:
    """Print the manifest as text, or as JSON with shared bytes."""
    from trimode.cli.output import print_json
    from trimode.runtime.bundle.open import read_manifest

    manifest = read_manifest(path)
    if as_json:
        data = {**manifest.model_dump(mode="json"), "sharing": sharing(manifest)}
        print_json(data, indent=1)
    else:
        sys.stdout.write("\n".join(describe(manifest)) + "\n")


def sharing(manifest: Manifest) -> dict[str, int]:
    """Count the packs' bytes, their readers, and the bytes that sharing saves.

    Without sharing, each compiled graph would hold a copy.
    """
    pack_bytes = sum(
        manifest.files[name].num_bytes
        for name in {pack for record in manifest.precisions.values() for pack in record.packs}
    )
    users = {name: _readers(record) for name, record in manifest.precisions.items()}
    copies = sum(manifest.precisions[name].weight_bytes * count for name, count in users.items())
    return {
        "pack_bytes": pack_bytes,
        "graphs": sum(users.values()),
        "bytes_saved": max(copies - pack_bytes, 0),
    }


def _readers(record: PrecisionRecord) -> int:
    """Compiled graphs that read the packs."""
    return sum(
        len(list(target.engines))
        for target in record.targets.values()
        if target.placement != "baked"
    )


def describe(manifest: Manifest) -> list[str]:
    """Describe the manifest in lines for people."""
    precisions = [
        line
        for name, record in manifest.precisions.items()
        for line in ("", *_precision(manifest, name, record))
    ]
    return [
        *_model(manifest),
        "",
        *_graphs(manifest),
        *precisions,
        "",
        *_sharing(manifest),
        "",
        *_files(manifest),
        "",
        *_versions(manifest),
    ]


def _model(manifest: Manifest) -> Iterator[str]:
    model = manifest.model
    size, heads = (
        manifest.source.num_parameters / 1e6,
        f"{model.num_attention_heads}/{model.num_key_value_heads} of {model.head_dim}",
    )
    yield (
        f"model      {manifest.source.name}, {size:.1f} M parameters, "
        f"{', '.join(manifest.precisions)}"
    )
    yield f"layers     {model.num_hidden_layers}, hidden {model.hidden_size}, heads {heads}"
    yield (
        f"tokens     vocabulary {model.vocab_size}, mask {model.mask_token_id}, end "
        f"{', '.join(map(str, model.eos_token_ids))}"
    )
    yield (
        f"lengths    prompt and answer {model.max_length}, block {model.block_size} (at most "
        f"{model.max_block_length})"
    )
    yield f"drafter    {'adapter on o_proj' if model.has_drafter else 'none'}"
    if manifest.sampler is not None:
        sampler, lengths = manifest.sampler, ", ".join(map(str, manifest.sampler.block_lengths))
        weight = (
            f"{sampler.num_parameters / 1e6:.2f} M parameters, "
            f"{manifest.files[sampler.file].num_bytes / 1e6:.1f} MB"
        )
        yield (
            f"sampler    {sampler.name}, {weight}, trained on blocks of {lengths}, fills from "
            f"a score of {sampler.threshold:g}"
        )


def _calibration(record: CalibrationRecord) -> str:
    blocks = f", blocks of {record.block_size}" if record.block_size else ""
    return (
        f"{record.algorithm}{blocks}, scales of {record.name}"
        if record.scales_sha256
        else f"rounded to nearest{blocks}"
    )


def _graphs(manifest: Manifest) -> Iterator[str]:
    for graph_name, contract in manifest.contracts.items():
        yield f"{graph_name:<9} {contract.attention}"
        for kind, specs in (("in", contract.inputs), ("out", contract.outputs)):
            yield from (
                f"          {kind:<4} {s.name:<18} {s.dtype:<8} [{', '.join(map(str, s.shape))}]"
                for s in specs
            )


def _precision(manifest: Manifest, name: PrecisionName, record: PrecisionRecord) -> Iterator[str]:
    kind = (
        f"{_calibration(record.calibration)}; the rest in {manifest.dtype}"
        if record.calibration
        else f"all in {manifest.dtype}"
    )
    first = (
        ", runs where none is asked for"
        if name == manifest.first_precision and len(manifest.precisions) > 1
        else ""
    )
    yield f"{name:<14} {kind}{first}"
    packs = ", ".join(
        f"{pack} ({manifest.files[pack].num_bytes / 1e6:.1f} MB)" for pack in record.packs
    )
    yield f"               {record.weight_bytes / 1e6:.1f} MB of weights, in {packs}"
    yield f"               portable graphs {', '.join(record.graphs.values())}"
    yield from _targets(manifest, record)


def _targets(manifest: Manifest, precision: PrecisionRecord) -> Iterator[str]:
    for name, record in precision.targets.items():
        where = (
            f"compute capability {record.compute_capability}"
            if record.compute_capability
            else record.device
        )
        yield (
            f"  {name:<12} {record.library}, {where}, computes in {record.compute_dtype}, "
            f"weights {record.placement}"
        )
        if record.capacity is not None:
            yield from _capacities(manifest, record)
    yield from _baked(precision.targets)


def _capacities(manifest: Manifest, record: TargetRecord) -> Iterator[str]:
    from trimode.formats.safetensors import NUMBER_BYTES

    lengths = (*(one.max_length for one in record.smaller), manifest.model.max_length)
    for one, length in zip(record.by_capacity(), lengths, strict=True):
        assert one.capacity is not None
        slot_bytes = NUMBER_BYTES[one.compute_dtype] * _slot_numbers(manifest.model)
        cache = f"{one.capacity * slot_bytes / 1e6:.1f} MB a sequence"
        size = sum(manifest.files[engine.file].num_bytes for engine in one.graphs.values())
        yield (
            f"               K/V cache of {one.capacity} slots ({cache}), texts of up to {length} "
            f"tokens, engines of {size / 1e6:.1f} MB"
        )
        yield from (
            f"               {graph_name:<9} {_profiles(engine.profiles)}"
            for graph_name, engine in one.graphs.items()
        )


def _slot_numbers(model: ModelInfo) -> int:
    """Numbers of one slot: keys and values of all layers."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim


def _sharing(manifest: Manifest) -> Iterator[str]:
    facts, count = (
        sharing(manifest),
        len({pack for record in manifest.precisions.values() for pack in record.packs}),
    )
    packs = "one pack" if count == 1 else f"{count} packs"
    yield (
        f"weights        {packs} of {facts['pack_bytes'] / 1e6:.1f} MB "
        f"serve{'s' if count == 1 else ''} {facts['graphs']} compiled graphs: "
        f"{facts['bytes_saved'] / 1e6:.1f} MB less than a copy in each"
    )


def _baked(targets: dict[str, TargetRecord]) -> Iterator[str]:
    names = [name for name, record in targets.items() if record.placement == "baked"]
    if names:
        yield f"               the engines of {', '.join(names)} hold copies of their own"
    for line in held_weights(targets):
        yield f"               {line}"


def held_weights(targets: dict[str, TargetRecord]) -> Iterator[str]:
    """Yield for each target the bytes that engines hold beside packs."""
    for name, record in targets.items():
        held = {engine.file: engine.constant_bytes for engine in record.engines}
        each, count = max(held.values(), default=0), len(held)
        if each and record.placement != "baked":
            engines = "the engine" if count == 1 else f"each of the {count} engines"
            yield (
                f"{engines} of {name} holds {each / 1e6:.1f} MB of weights and scales:"
                f" {sum(held.values()) / 1e6:.1f} MB on the GPU"
            )


def _profiles(profiles: tuple[ProfileRecord, ...]) -> str:
    def span(low: int, high: int) -> str:
        return str(low) if low == high else f"{low}..{high}"

    sizes = ", ".join(span(profile.rows[0], profile.rows[2]) for profile in profiles)
    return f"rows {sizes}; batch {span(profiles[0].batch[0], profiles[0].batch[2])}"


def _files(manifest: Manifest) -> Iterator[str]:
    for name, record in sorted(manifest.files.items()):
        yield f"{record.num_bytes:>15,}  {record.sha256[:16]}  {name}"


def _versions(manifest: Manifest) -> Iterator[str]:
    yield "built with " + ", ".join(
        f"{k} {v}" for k, v in (("trimode", manifest.trimode_version), *manifest.libraries.items())
    )
