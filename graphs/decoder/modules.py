"""Defines the graphs as modules over one trunk.

Each says which rows attend how, and what the graph returns instead of raw logits.

Each ``forward`` takes tensors in the order of :func:`trimode.formats.contract.graph_contract`, then
the cache as a list, and returns the contract's outputs followed by the updated cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimode.formats.contract import TOP_K, GraphName
from trimode.graphs.decoder.attention import FixedCacheAttention
from trimode.graphs.decoder.quadratic import (
    drafted_rows,
    quadratic_mask,
    quadratic_positions,
    quadratic_tokens,
)
from trimode.graphs.decoder.trunk import TriModeTrunk

Cache = list[Tensor]


class ArModule(nn.Module):
    """Runs causal rows; the head sees each sequence's last real row."""

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, input_ids: Tensor, past_length: Tensor, input_length: Tensor, past_key_values: Cache
    ) -> tuple[Tensor, Tensor, Cache]:
        """Return ``greedy_ids (B,)``, ``logits (B, V)`` and the updated cache."""
        hidden, present = _run(self.trunk, input_ids, past_length, past_key_values, is_causal=True)
        last = (input_length - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits = self.trunk.head(hidden.gather(1, last).squeeze(1))
        return logits.argmax(-1), logits.float(), present


class DraftModule(nn.Module):
    """Runs a block whose slots see each other.

    The head answers for the slot itself. The graph denoises and, with the adapter, drafts.
    """

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self,
        input_ids: Tensor,
        past_length: Tensor,
        drafter_scale: Tensor | None,
        past_key_values: Cache,
    ) -> tuple[Tensor, Tensor, Cache]:
        """Return candidates, their probabilities and the updated cache.

        They are ``top_ids (B, T, 5)`` and ``top_probabilities (B, T, 5)``.
        """
        hidden, present = _run(
            self.trunk,
            input_ids,
            past_length,
            past_key_values,
            is_causal=False,
            drafter_scale=drafter_scale,
        )
        return *_candidates(self.trunk, hidden), present


class VerifyModule(nn.Module):
    """Runs causal rows over a draft, and counts agreeing tokens."""

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, input_ids: Tensor, past_length: Tensor, past_key_values: Cache
    ) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Return the greedy ids, the accepted length, the logits and the cache.

        ``greedy_ids (B, T)``, ``accepted_length (B,)``, ``logits (B, T, V)`` and the updated cache.
        """
        hidden, present = _run(self.trunk, input_ids, past_length, past_key_values, is_causal=True)
        return *_verified(self.trunk, hidden, input_ids), present


class QuadraticModule(nn.Module):
    """Verifies a draft and drafts the next one in a single forward.

    The head sees the draft's rows, then those behind the last accepted token.
    """

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, input_ids: Tensor, past_length: Tensor, past_key_values: Cache
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Cache]:
        """Return the verified ids, the logits, the next candidates and the cache.

        ``greedy_ids (B, T)``, ``accepted_length (B,)``, ``logits (B, T, V)``, ``top_ids``,
        ``top_probabilities (B, T, 5)``, the cache.
        """
        rows, capacity = input_ids.shape[1], past_key_values[0].shape[2]
        attend = FixedCacheAttention(
            past_key_values,
            past_length,
            is_causal=False,
            mask=quadratic_mask(past_length, rows, capacity),
        )
        tokens = quadratic_tokens(input_ids, self.trunk.config.mask_token_id)
        hidden = self.trunk(tokens, quadratic_positions(past_length, rows), attend)
        greedy_ids, accepted_length, logits = _verified(self.trunk, hidden[:, :rows], input_ids)
        chosen = drafted_rows(accepted_length, rows)[:, :, None].expand(-1, -1, hidden.shape[-1])
        return (
            greedy_ids,
            accepted_length,
            logits,
            *_candidates(self.trunk, hidden.gather(1, chosen)),
            attend.present,
        )


def build_module(graph_name: GraphName, trunk: TriModeTrunk) -> nn.Module:
    """Build the module of a graph."""
    return {
        "ar": ArModule,
        "draft": DraftModule,
        "verify": VerifyModule,
        "quadratic": QuadraticModule,
    }[graph_name](trunk)


def _candidates(trunk: TriModeTrunk, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Give the most probable ids and their probabilities, ``(B, T, 5)``.

    Hidden states are ``(B, T, hidden_size)``.
    """
    logits = trunk.head(hidden.flatten(0, 1)).float()
    values, ids = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    # Softmax over the vocabulary, evaluated at the candidates alone; the largest logit is the first
    # of them.
    best = values[:, :1]
    probabilities = (values - best).exp() / (logits - best).exp().sum(-1, keepdim=True)
    return _rows(ids, hidden), _rows(probabilities, hidden)


def _verified(
    trunk: TriModeTrunk, hidden: Tensor, input_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify causal hidden states over ``input_ids``.

    Returns greedy ids ``(B, T)``, how many drafts agree with them ``(B,)``, and logits ``(B, T,
    V)``.
    """
    logits = trunk.head(hidden.flatten(0, 1))
    greedy_ids = logits.argmax(-1).reshape(input_ids.shape)
    # accepted = number of leading i with greedy[i] == draft[i + 1]: rows before which no mismatch
    # has been counted.
    mismatch = (greedy_ids[:, :-1] != input_ids[:, 1:]).to(torch.int64)
    accepted_length = (mismatch.cumsum(1) == 0).to(torch.int64).sum(1)
    return greedy_ids, accepted_length, _rows(logits.float(), input_ids)


def _rows(flat: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B * T, n)`` to ``(B, T, n)`` like ``like``."""
    return flat.reshape(*like.shape[:2], -1)


def _run(
    trunk: TriModeTrunk,
    input_ids: Tensor,
    past_length: Tensor,
    past: Cache,
    *,
    is_causal: bool,
    drafter_scale: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    attend = FixedCacheAttention(past, past_length, is_causal=is_causal)
    positions = (
        past_length[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    )
    hidden = trunk(input_ids, positions, attend, drafter_scale)
    return hidden, attend.present
