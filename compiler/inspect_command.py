"""``trimode inspect``: what a bundle holds."""

from __future__ import annotations

import sys
from pathlib import Path

from trimode.runtime.bundle import read_manifest
from trimode.runtime.manifest import Manifest


def inspect_bundle(path: Path, *, as_json: bool) -> None:
    """Print the manifest, for people or as JSON."""
    manifest = read_manifest(path)
    sys.stdout.write(manifest.model_dump_json(indent=1) + "\n" if as_json else "\n".join(describe(manifest)) + "\n")


def describe(manifest: Manifest) -> list[str]:
    """The manifest in lines for people."""
    model = manifest.model
    size, heads = manifest.source.num_parameters / 1e6, f"{model.num_attention_heads}/{model.num_key_value_heads} of {model.head_dim}"
    lines = [
        f"model      {manifest.source.name}, {size:.1f} M parameters, {manifest.precision}, {', '.join(manifest.targets)}",
        f"layers     {model.num_hidden_layers}, hidden {model.hidden_size}, heads {heads}",
        f"tokens     vocabulary {model.vocab_size}, mask {model.mask_token_id}, end {', '.join(map(str, model.eos_token_ids))}",
        f"lengths    prompt and answer {model.max_length}, block {model.block_size} (at most {model.max_block_length})",
        f"drafter    {'adapter on o_proj' if model.has_drafter else 'none'}",
        "",
    ]
    for role, graph in manifest.graphs.items():
        lines.append(f"{role:<8} {graph.contract.attention:<14} {graph.file}")
        for kind, specs in (("in", graph.contract.inputs), ("out", graph.contract.outputs)):
            lines += [f"         {kind:<4} {s.name:<18} {s.dtype:<8} [{', '.join(map(str, s.shape))}]" for s in specs]
    lines += ["", *(f"{record.num_bytes:>13,}  {record.sha256[:16]}  {name}" for name, record in sorted(manifest.files.items())), ""]
    lines.append("built with " + ", ".join(f"{k} {v}" for k, v in (("trimode", manifest.trimode_version), *manifest.libraries.items())))
    return lines
