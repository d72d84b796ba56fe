"""Lists the weights and scales that an engine of TensorRT-RTX holds.

TensorRT-RTX 1.7 reads these weights once, as they lie, only if it knows them when it compiles. As
inputs it transposes or expands them in every forward:

- int4: weights and the scales of their blocks. One kernel then widens and multiplies.
- int8 without a scale for the input: the same.
- nvfp4: the scales of the blocks, which it puts in the order that its products of four-bit numbers
  want. The weights themselves stay inputs.

Scales of products in 8 bits are constants too (``passes.scales_to_constants``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimode.compiler.passes.quantize_weights import Stored
from trimode.runtime.bundle.weights import PrecisionWeights

_WEIGHT = ".weight"


def constant_weights(pack: Mapping[str, Stored]) -> tuple[str, ...]:
    """Names of these tensors, sorted."""
    found: set[str] = set()
    for name, stored in pack.items():
        layer = name.removesuffix(_WEIGHT)
        if name.endswith(_WEIGHT) and _is_fused(stored, f"{layer}.input_scale" in pack):
            found |= {name, f"{layer}.weight_scale"}
        elif stored.dtype == "float4e2m1":
            found |= {f"{layer}.weight_scale", f"{layer}.weight_scale_2"}
    return tuple(sorted(found))


def _is_fused(weight: Stored, has_input_scale: bool) -> bool:
    """Tell whether one kernel widens a weight and multiplies by it.

    The other factor is in high precision.
    """
    return weight.dtype == "int4" or (weight.dtype == "int8" and not has_input_scale)


def digest_of(packs: Sequence[Path], names: Sequence[str]) -> str:
    """Digest of names and bytes, in the order given."""
    weights, digest = PrecisionWeights(packs), hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0".encode())
        digest.update(weights.raw(name).data)
    return digest.hexdigest()
