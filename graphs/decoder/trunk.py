"""Defines the decoder: a Ministral-3 trunk with one untied output head.

It is written once for export, eager use and training.

Module names equal the checkpoint's tensor names, so a state dict is a checkpoint and an exported
initializer keeps its name. The attention pattern is an argument, because it is all that
distinguishes one mode from another.

Inside, hidden states are flat, ``(B * T, hidden_size)``: every projection is then a two-dimensional
product, which exports as a Gemm that reads the checkpoint's ``(out, in)`` weights as they lie, with
no transposed copy in any runtime.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.graphs.config import ModelConfig
from trimode.graphs.decoder.attention import AttentionPattern
from trimode.graphs.decoder.rope import rope_tables


class TriModeTrunk(nn.Module):
    """Turns token ids into hidden states, and by ``head`` into logits.

    Args:
        config: Configuration of the model.
        num_positions: Rows of the rotary tables: the largest position plus one.
        drafter_rank: Rank of the drafter's adapter on ``o_proj``; 0 = the checkpoint has none.
        drafter_alpha: Numerator of the adapter's scale; the branch is scaled by alpha / rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_positions: int,
        *,
        drafter_rank: int = 0,
        drafter_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, drafter_rank, drafter_alpha)
        self.rope = Rope(config, num_positions)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: AttentionPattern,
        drafter_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return hidden states ``(B, T, hidden_size)`` after the last norm.

        Args:
            input_ids: Token ids, (B, T) int64.
            positions: Absolute positions, (B, T) int64.
            attend: Attention pattern.
            drafter_scale: Factor of the drafter's branch, a scalar or one number a row, (B or 1, T,
                1); None leaves the branch out of the computation.
        """
        if isinstance(drafter_scale, Tensor) and drafter_scale.ndim == 3:
            drafter_scale = drafter_scale.expand(*input_ids.shape, 1).flatten(0, 1)
        hidden = self.encoder(input_ids, self.rope(positions), attend, drafter_scale)
        return hidden.unflatten(0, input_ids.shape)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits ``(..., vocab_size)``.

        In a denoised slot they are of the token itself, in a causal row of the next one.
        """
        return self.diffusion_head(hidden)  # type: ignore[no-any-return]


class Rotation(NamedTuple):
    """Rotary angles of the current tokens.

    While exporting, ``cos`` and ``sin`` are the whole tables ``(N, D/2)`` and ``positions (B, T)``
    picks rows inside the graph; otherwise they are the rows already picked, ``(B, 1, T, D/2)``.
    ``query_scale`` is ``(B, 1, T, 1)`` or None.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    query_scale: Tensor | None

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate ``x (B, heads, T, D)`` in the half-split layout."""
        if torch.compiler.is_exporting():
            return torch.onnx.ops.rotary_embedding(x, self.cos, self.sin, self.positions)
        first, second = x.chunk(2, -1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def rotate_query(self, q: Tensor) -> Tensor:
        """Rotate, then apply the Llama-4 scale where the model has one."""
        q = self.rotate(q)
        return q if self.query_scale is None else q * self.query_scale.to(q.dtype)


class Rope(nn.Module):
    """Holds the position tables, which the exporter turns into initializers."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None

    def __init__(self, config: ModelConfig, num_positions: int) -> None:
        super().__init__()
        tables = rope_tables(config.rope, config.head_dim, num_positions)
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", torch.from_numpy(tables.cos).to(dtype), persistent=False)
        self.register_buffer("sin", torch.from_numpy(tables.sin).to(dtype), persistent=False)
        scale = (
            None
            if tables.query_scale is None
            else torch.from_numpy(tables.query_scale)[:, None].to(dtype)
        )
        self.register_buffer("query_scale", scale, persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """Angles for positions ``(B, T)``."""
        scale = (
            None
            if self.query_scale is None
            else functional.embedding(positions, self.query_scale)[:, None]
        )
        if torch.compiler.is_exporting():
            return Rotation(self.cos, self.sin, positions, scale)
        return Rotation(
            self.cos[positions][:, None], self.sin[positions][:, None], positions, scale
        )


class Encoder(nn.Module):
    """Embedding, layers and the last norm (the checkpoint calls the trunk ``encoder``)."""

    def __init__(self, config: ModelConfig, drafter_rank: int, drafter_alpha: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, i, drafter_rank, drafter_alpha) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        rotation: Rotation,
        attend: AttentionPattern,
        drafter_scale: Tensor | float | None,
    ) -> Tensor:
        x = self.embed_tokens(input_ids).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, rotation, attend, drafter_scale)
        return self.norm(x)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual."""

    def __init__(
        self, config: ModelConfig, index: int, drafter_rank: int, drafter_alpha: float
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, index, drafter_rank, drafter_alpha)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: AttentionPattern,
        drafter_scale: Tensor | float | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, attend, drafter_scale)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(
        self, config: ModelConfig, index: int, drafter_rank: int, drafter_alpha: float
    ) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.key_value_size, bias=False)
        self.o_proj = LowRankLinear(
            config.query_size, config.hidden_size, drafter_rank, drafter_alpha
        )

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: AttentionPattern,
        drafter_scale: Tensor | float | None,
    ) -> Tensor:
        batch, rows = rotation.positions.shape

        def heads(projection: nn.Linear) -> Tensor:
            return projection(x).reshape(batch, rows, -1, self.head_dim).transpose(1, 2)  # type: ignore[no-any-return]

        q, k, v = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        out = attend(self.index, rotation.rotate_query(q), rotation.rotate(k), v)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape[0], -1), drafter_scale)  # type: ignore[no-any-return]


class LowRankLinear(nn.Linear):
    """Multiplies, and adds a low-rank branch where rank > 0.

    It gives ``x W' + drafter_scale * (alpha / rank) * x A' B'`` (LoRA, Hu et al. 2021).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scaling = alpha / rank if rank else 0.0
        self.lora_A = nn.Linear(in_features, rank, bias=False) if rank else None
        self.lora_B = nn.Linear(rank, out_features, bias=False) if rank else None
        if self.lora_B is not None:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, drafter_scale: Tensor | float | None = None) -> Tensor:
        y = self.product(x)
        if drafter_scale is None or self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_B(self.lora_A(x) * (drafter_scale * self.scaling))  # type: ignore[no-any-return]

    def product(self, x: Tensor) -> Tensor:
        """Multiply ``x (..., in)`` by the weight, without the branch.

        Subclasses quantize this product.
        """
        return functional.linear(x, self.weight)


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
