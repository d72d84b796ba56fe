"""Defines the learned sampler of block diffusion.

It says how sure one may be that the best candidate of a masked slot is right.

A denoise forward names five candidates a slot. From them and from what stands in the block, this
network gives each slot a score, the probability that its best candidate is the token that serial
denoising (the most probable slot a forward) would end with. A runtime fills the slots whose score
is high enough. Nemotron-Labs-Diffusion report (arXiv 2607.05722), section 4 and appendix A; no
trained one has been published, so sizes and features follow what is public of its inference code.

The network corrects the model's own confidence: its output is added to the log-odds of the best
candidate's probability. That probability is a good judge already, and a network that had to learn
so first would take more data to be any better.

Features, their standardisation and the network are one module, and one graph once exported: there
is no second implementation to keep in step. Shapes: B blocks, L slots, F features, d model width, H
heads, D = d / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.formats.contract import TOP_K

SEMANTICS = 32
"""Numbers that stand for a token."""
NUM_LOOKUPS = 4
"""Tokens of a slot that are looked up: the one that stands there, and the three best candidates."""
NUM_FEATURES = 16 + NUM_LOOKUPS * SEMANTICS
"""144, in the order of :meth:`BlockSampler.features`."""
LEAST_PROBABILITY = 1e-10
LEAST_DOUBT = 1e-6
"""A probability is taken to be at least so far from 0 and 1 where the network corrects it."""
ROPE_THETA = 1e4
DROPOUT = 0.1


@dataclass(frozen=True)
class SamplerShape:
    """Holds the network's sizes; the defaults are the published inference code's."""

    d_model: int = 192
    num_layers: int = 4
    num_heads: int = 8
    feed_forward: int = 384


class BlockSampler(nn.Module):
    """Scores slots by a small transformer over standardised features.

    The slots of a block see each other.

    Args:
        shape: Sizes of the network.
        vocab_size: Number of tokens.

    Attributes:
        token_table: Semantics of the tokens, ``(V, 32)`` float16, see :func:`token_semantics`.
        feature_mean, feature_std: Statistics ``(F,)`` of the data that the network was trained on.
    """

    token_table: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, shape: SamplerShape, vocab_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("token_table", torch.zeros(vocab_size, SEMANTICS, dtype=torch.float16))
        self.register_buffer("feature_mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("feature_std", torch.ones(NUM_FEATURES))
        self.embed = nn.Linear(NUM_FEATURES, shape.d_model)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, 1)
        nn.init.zeros_(self.head.weight)  # an untrained network scores each slot by its probability
        nn.init.zeros_(self.head.bias)

    def forward(
        self, input_ids: Tensor, masked: Tensor, top_ids: Tensor, top_probabilities: Tensor
    ) -> Tensor:
        """Score each slot.

        Args:
            input_ids: Block as the denoise forward saw it, ``(B, L)`` int64.
            masked: Masked slots of the block, ``(B, L)`` bool.
            top_ids: Candidates that the forward returned, ``(B, L, 5)`` int64.
            top_probabilities: Probabilities of the candidates, ``(B, L, 5)`` float32.

        Returns:
            ``(B, L)`` float32, from 0 to 1; of masked slots alone it means anything.
        """
        return self.logits(input_ids, masked, top_ids, top_probabilities).sigmoid()

    def logits(
        self, input_ids: Tensor, masked: Tensor, top_ids: Tensor, top_probabilities: Tensor
    ) -> Tensor:
        """Return what :meth:`forward` takes the sigmoid of."""
        hidden = self.embed(
            (self.features(input_ids, masked, top_ids, top_probabilities) - self.feature_mean)
            / self.feature_std
        )
        cos, sin = _rotations(
            hidden.shape[1], self.shape.d_model // self.shape.num_heads, hidden.device
        )
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        confidence = top_probabilities[..., 0].clamp(LEAST_DOUBT, 1 - LEAST_DOUBT)
        return confidence.logit() + self.head(self.norm(hidden)).squeeze(-1)  # type: ignore[no-any-return]

    def features(
        self, input_ids: Tensor, masked: Tensor, top_ids: Tensor, top_probabilities: Tensor
    ) -> Tensor:
        """Compute the features ``(B, L, F)``, before standardisation."""
        p = top_probabilities  # (B, L, 5)
        log_p = p.clamp(min=LEAST_PROBABILITY).log()
        flags = masked.to(p.dtype)  # (B, L)
        num_masked = flags.sum(1, keepdim=True).expand_as(flags)
        length = input_ids.shape[1]
        position = torch.arange(length, device=p.device, dtype=p.dtype).expand_as(flags)
        tokens = torch.cat((input_ids[..., None], top_ids[..., : NUM_LOOKUPS - 1]), -1)  # (B, L, 4)
        columns = torch.stack(
            (
                p[..., 0],
                p[..., 0] - p[..., 1],  # margin
                p[..., :3].sum(-1),
                -(p * log_p).sum(-1),  # entropy, of the five
                flags,
                torch.zeros_like(flags),  # keeps the published layout of 144
                num_masked / length,
                log_p[..., 0],
                1 - (p * p).sum(-1),  # Gini impurity, of the five
                position / length,
                (num_masked + 1).log(),
            ),
            -1,
        )
        return torch.cat(
            (p, columns, functional.embedding(tokens, self.token_table).to(p.dtype).flatten(-2)), -1
        )


class _Layer(nn.Module):
    """Applies attention and a feed-forward network, each behind a LayerNorm.

    Each is added to what came in. There is dropout while it is trained.
    """

    def __init__(self, shape: SamplerShape) -> None:
        super().__init__()
        self.dropout = nn.Dropout(DROPOUT)
        head_dim = shape.d_model // shape.num_heads
        self.num_heads = shape.num_heads
        self.attention_norm, self.mlp_norm = (
            nn.LayerNorm(shape.d_model),
            nn.LayerNorm(shape.d_model),
        )
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model)
        self.query_norm, self.key_norm = nn.LayerNorm(head_dim), nn.LayerNorm(head_dim)
        self.output = nn.Linear(shape.d_model, shape.d_model)
        self.up = nn.Linear(shape.d_model, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, shape.d_model)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), cos, sin))
        return hidden + self.dropout(self.down(functional.gelu(self.up(self.mlp_norm(hidden)))))  # type: ignore[no-any-return]

    def _attend(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(hidden)
        batch, length, width = hidden.shape
        heads = qkv.reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(
            2, 0, 3, 1, 4
        )
        query, key, value = heads.unbind(0)  # (B, H, L, D) each
        query, key = (
            rotate_pairs(self.query_norm(query), cos, sin),
            rotate_pairs(self.key_norm(key), cos, sin),
        )
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs (2i, 2i + 1) by their position.

    ``x (B, H, L, D)``, ``cos`` and ``sin (L, D / 2)``.
    """
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _rotations(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(L, D / 2)`` of each slot's angles."""
    frequencies = ROPE_THETA ** (
        -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    )
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def token_semantics(embeddings: Tensor) -> Tensor:
    """Compute the first 32 principal components of the tokens' embeddings.

    Centred, scaled to a mean square of 1 and rounded to float16. A component's sign is that which
    makes its largest weight positive, so that the same embeddings always give the same table.
    Narrower embeddings, or fewer tokens, leave columns of zeros.

    Args:
        embeddings: Embeddings of the tokens, ``(V, hidden_size)``.

    Returns:
        ``(V, 32)`` float16, on the CPU.
    """
    centred = (
        embeddings.detach().to("cpu", torch.float32)
        - embeddings.detach().to("cpu", torch.float64).mean(0).float()
    )
    covariance = torch.zeros(centred.shape[1], centred.shape[1], dtype=torch.float64)
    # in float64 all of them would take twice their memory again
    for rows in torch.split(centred, 8192):
        covariance += rows.double().T @ rows.double()
    _, vectors = torch.linalg.eigh(covariance)
    count = min(SEMANTICS, *centred.shape)
    components = vectors.flip(1)[:, :count]
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    components = (components * largest.sign()).float()
    table = torch.zeros(centred.shape[0], SEMANTICS)
    table[:, :count] = centred @ components
    scale = table.square().mean().sqrt()
    return (table / scale if scale > 0 else table).half()


assert NUM_FEATURES == TOP_K + 11 + NUM_LOOKUPS * SEMANTICS
