"""Checks that weights have the shapes that the manifest implies."""

from __future__ import annotations

from collections.abc import Mapping

from trimode.errors import BundleError
from trimode.formats.contract import ModelInfo
from trimode.formats.hints import REBUILD
from trimode.formats.safetensors import PackEntry

_LAYER = "encoder.layers.{}.self_attn.{}_proj.weight"


def expected_shapes(model: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that together show every size of the model."""
    query = (model.num_attention_heads * model.head_dim, model.hidden_size)
    key_value = (model.num_key_value_heads * model.head_dim, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens.weight": (model.vocab_size, model.hidden_size),
        "rope.cos": (model.num_positions, model.head_dim // 2),
    }
    for layer in range(model.num_hidden_layers):
        shapes |= {
            _LAYER.format(layer, part): shape
            for part, shape in (("q", query), ("k", key_value), ("v", key_value))
        }
    return shapes


def check_shapes(tensors: Mapping[str, PackEntry], model: ModelInfo) -> None:
    """Check tensors against the model.

    Raises:
        BundleError: a tensor is missing or of another shape, or there are more layers.
    """
    for name, shape in expected_shapes(model).items():
        found = tensors.get(name)
        if found is None or found.shape != shape:
            what = "none" if found is None else list(found.shape)
            raise BundleError(
                f"expected weights of the model that the manifest describes, with {name} of shape "
                f"{list(shape)}, found {what}",
                REBUILD,
            )
    more = _LAYER.format(model.num_hidden_layers, "q")
    if more in tensors:
        raise BundleError(
            f"expected weights of {model.num_hidden_layers} layers, found {more}", REBUILD
        )
