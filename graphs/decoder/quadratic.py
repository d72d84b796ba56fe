"""Lays out the rows of quadratic self-speculation.

One forward verifies a draft and drafts the next block after each of its prefixes.

A draft of ``k`` tokens ``d_0 .. d_{k-1}`` becomes ``k (k + 1)`` rows: its tokens, then for each of
them ``k`` masked slots, which predict what follows if the draft is accepted up to there. Behind
``n`` cached tokens:

===================  ===================  =================  =================================
row                  slot in the cache    position           sees, besides the cached tokens
===================  ===================  =================  =================================
token ``r``          ``n + r``            ``n + r``          tokens ``0 .. r``
slot ``c`` of ``r``  ``n + k + r k + c``  ``n + r + 1 + c``  tokens ``0 .. r``, slots of ``r``
===================  ===================  =================  =================================

So the tokens' rows are those of a causal forward, and their keys and values stay. Those of the
slots lie behind them, where the next forward overwrites them. Source: Nemotron-Labs-Diffusion
(arXiv 2607.05722); TiDAR: Think in Diffusion, Talk in Autoregression (Liu et al., arXiv 2511.08923)
has the same layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quadratic_tokens(draft: Tensor, mask_token_id: int) -> Tensor:
    """Return ``draft (B, k)`` and its masked slots.

    The result is ``(B, k (k + 1))`` int64.
    """
    batch, rows = draft.shape
    return torch.cat((draft, draft.new_full((1, 1), mask_token_id).expand(batch, rows * rows)), 1)


def quadratic_positions(past_length: Tensor, rows: int) -> Tensor:
    """Give absolute positions ``(B, k (k + 1))`` behind ``past_length (B,)`` tokens.

    ``rows`` is k.
    """
    token = torch.arange(rows, device=past_length.device)
    slots = (token[:, None] + token[None] + 1).reshape(-1)
    return past_length[:, None] + torch.cat((token, slots))[None]


def quadratic_mask(past_length: Tensor, rows: int, capacity: int) -> Tensor:
    """Return which slots each row sees, as a mask.

    It is ``(B, 1, k (k + 1), capacity)`` bool. The rows' keys are in the cache by then.
    """
    token = torch.arange(rows, device=past_length.device)
    # (k k,) the token that a masked slot belongs to
    owner = token[:, None].expand(-1, rows).reshape(-1)
    last = torch.cat((token, owner))
    # A masked slot also sees its own k: from begin to end, counted from past_length. A token's
    # interval is empty.
    begin = torch.cat((torch.zeros_like(token), rows + owner * rows))
    end = torch.cat((torch.zeros_like(token), 2 * rows + owner * rows))
    # (B, 1, C); cached tokens are negative
    key = (torch.arange(capacity, device=past_length.device)[None] - past_length[:, None])[:, None]
    seen = (key <= last[:, None]) | ((key >= begin[:, None]) & (key < end[:, None]))
    return seen[:, None]


def drafted_rows(accepted_length: Tensor, rows: int) -> Tensor:
    """Choose the rows that predict the next draft, ``(B, k)``.

    ``accepted_length (B,)`` drafts behind the first were right.

    The first is the last accepted token's own: its causal prediction is verified already, so it
    takes the place of the first slot's.
    """
    slot = torch.arange(rows, device=accepted_length.device)[None]
    token = accepted_length[:, None]
    return torch.where(slot == 0, token, rows + token * rows + slot)
