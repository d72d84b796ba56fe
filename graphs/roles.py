"""The three roles as modules over one trunk: which rows attend how, and what the graph returns instead of raw logits.

Each ``forward`` takes tensors in the order of :func:`trimode.graphs.contract.graph_contract`, then the cache as a list, and returns
the contract's outputs followed by the updated cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimode.graphs.attention import FixedCacheAttention
from trimode.graphs.contract import TOP_K, Role
from trimode.graphs.trunk import TriModeTrunk

Cache = list[Tensor]


class ArRole(nn.Module):
    """Causal rows; the head sees one row a sequence, the last real one."""

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, past_length: Tensor, input_length: Tensor, past_key_values: Cache) -> tuple[Tensor, Tensor, Cache]:
        """Return ``greedy_ids (B,)``, ``logits (B, V)`` and the updated cache."""
        hidden, present = _run(self.trunk, input_ids, past_length, past_key_values, is_causal=True)
        last = (input_length - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits = self.trunk.head(hidden.gather(1, last).squeeze(1))
        return logits.argmax(-1), logits.float(), present


class DraftRole(nn.Module):
    """A block whose slots see each other; the head answers for the slot itself. Used to denoise and, with the adapter, to draft."""

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, past_length: Tensor, drafter_scale: Tensor | None, past_key_values: Cache) -> tuple[Tensor, Tensor, Cache]:
        """Return ``top_ids (B, T, 5)``, ``top_probabilities (B, T, 5)`` and the updated cache."""
        hidden, present = _run(self.trunk, input_ids, past_length, past_key_values, is_causal=False, drafter_scale=drafter_scale)
        logits = self.trunk.head(hidden.flatten(0, 1)).float()
        values, ids = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
        # Softmax over the vocabulary, evaluated at the candidates alone; the largest logit is the first of them.
        best = values[:, :1]
        probabilities = (values - best).exp() / (logits - best).exp().sum(-1, keepdim=True)
        return _rows(ids, input_ids), _rows(probabilities, input_ids), present


class VerifyRole(nn.Module):
    """Causal rows over a drafted block; every row's next token, and how many drafts agree with it."""

    def __init__(self, trunk: TriModeTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, past_length: Tensor, past_key_values: Cache) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Return ``greedy_ids (B, T)``, ``accepted_length (B,)``, ``logits (B, T, V)`` and the updated cache."""
        hidden, present = _run(self.trunk, input_ids, past_length, past_key_values, is_causal=True)
        logits = self.trunk.head(hidden.flatten(0, 1))
        greedy_ids = logits.argmax(-1).reshape(input_ids.shape)
        # accepted = number of leading i with greedy[i] == draft[i + 1]: rows before which no mismatch has been counted.
        mismatch = (greedy_ids[:, :-1] != input_ids[:, 1:]).to(torch.int64)
        accepted_length = (mismatch.cumsum(1) == 0).to(torch.int64).sum(1)
        return greedy_ids, accepted_length, _rows(logits.float(), input_ids), present


def build_role(role: Role, trunk: TriModeTrunk) -> nn.Module:
    """The module of a role."""
    return {"ar": ArRole, "draft": DraftRole, "verify": VerifyRole}[role](trunk)


def _rows(flat: Tensor, input_ids: Tensor) -> Tensor:
    """``(B * T, n)`` -> ``(B, T, n)``."""
    return flat.reshape(*input_ids.shape, -1)


def _run(
    trunk: TriModeTrunk, input_ids: Tensor, past_length: Tensor, past: Cache, *, is_causal: bool, drafter_scale: Tensor | None = None
) -> tuple[Tensor, Cache]:
    attend = FixedCacheAttention(past, past_length, is_causal=is_causal)
    positions = past_length[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    hidden = trunk(input_ids, positions, attend, drafter_scale)
    return hidden, attend.present
