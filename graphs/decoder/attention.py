"""Defines attention patterns; a pattern and its tokens make a mode.

A pattern is called once a layer with the queries, keys and values of the new tokens, already
rotated, and returns what the queries read: ``q (B, H, T, D)``, ``k`` and ``v`` ``(B, G, T, D)`` ->
``(B, H, T, D)``. Softmax scale is ``1 / sqrt(D)``.

- :class:`FixedCacheAttention` is what the exported graphs contain (standard ONNX operators, no
  eager meaning)
- :class:`GrowingCacheAttention` is the plain eager reference with a cache that grows by
  concatenation
- :class:`MaskedAttention` has no cache and an explicit mask: training
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

OPSET = 24


class AttentionPattern(Protocol):
    """Attends for a layer; see the module's docstring for shapes."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the queries of this layer read."""
        ...


class FixedCacheAttention:
    """Scatters keys and values into a fixed cache, then attends.

    For export only. New tokens attend to the valid slots. ``present`` holds the updated caches in
    the same order; a runtime that binds present to the memory of past updates in place.

    Args:
        past_key_values: Key and value per layer, alternating, each ``(B, G, C, D)``.
        past_length: Number of tokens already in the cache, per sequence, ``(B,)`` int64.
        is_causal: Whether new tokens see only earlier ones, or each sees all of them.
        mask: Slots that a new token sees, ``(B, 1, T, C)`` bool; None = the whole pattern is what
            ``is_causal`` says.
    """

    def __init__(
        self,
        past_key_values: list[Tensor],
        past_length: Tensor,
        *,
        is_causal: bool,
        mask: Tensor | None = None,
    ) -> None:
        self.past = past_key_values
        self.past_length = past_length
        self.is_causal = is_causal
        self.mask = mask
        self.present: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Emit TensorScatter and Attention (ONNX opset 24)."""
        key = self._scatter(self.past[2 * layer], k)
        value = self._scatter(self.past[2 * layer + 1], v)
        self.present += [key, value]
        valid_length = self.past_length + q.shape[2]
        return torch.onnx.ops.symbolic(
            "Attention",
            (q, key, value, self.mask, None, None, valid_length),
            attrs={"is_causal": int(self.is_causal)},
            dtype=q.dtype,
            shape=q.shape,
            version=OPSET,
        )

    def _scatter(self, cache: Tensor, new: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, new, self.past_length),
            attrs={"axis": 2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=OPSET,
        )


class GrowingCacheAttention:
    """Attends eagerly over a cache that grows by concatenation.

    It is the obvious version, for one length in the whole batch.

    ``is_causal`` and ``writes_cache`` may be changed between forwards; ``crop`` rolls back.
    """

    def __init__(self) -> None:
        self.is_causal = True
        self.writes_cache = True
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache[0][0].shape[2] if self._cache else 0

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        self._cache = {i: (k[:, :, :length], v[:, :, :length]) for i, (k, v) in self._cache.items()}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the cache and the new tokens.

        The module's docstring gives the shapes.
        """
        rows = q.shape[2]
        if layer in self._cache:
            past_k, past_v = self._cache[layer]
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        if self.writes_cache:
            self._cache[layer] = (k, v)
        mask = None
        if self.is_causal and rows > 1:
            past = k.shape[2] - rows
            mask = torch.ones(rows, past + rows, dtype=torch.bool, device=q.device).tril(past)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class MaskedAttention:
    """Attends without a cache under an explicit boolean mask.

    The mask is ``(T, T)`` or ``(B, 1, T, T)``, True where a query sees a key.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        """Attend under the mask; see the module's docstring for shapes."""
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, enable_gqa=True
        )
