"""The tensor contract: what each graph takes and returns, as data that the compiler writes and the runtime reads.

Three roles over one set of weights. ``B`` batch, ``T`` new tokens, ``C`` cache capacity, ``G`` key/value heads, ``D`` head size,
``V`` vocabulary. Every graph also takes ``past_key_values.{i}.key|value`` and returns ``present.{i}.key|value``, ``(B, G, C, D)``,
which may be the same memory. A row's K/V land in slots ``past_length .. past_length + T - 1``; nothing else of the cache changes,
so rolling back is not advancing ``past_length``.

This module imports neither torch nor onnx.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Role = Literal["ar", "draft", "verify"]
ROLES: tuple[Role, ...] = ("ar", "draft", "verify")

TOP_K = 5
"""Candidates a draft graph returns per slot: what the confidence policies and the learned sampler read."""

Dimension = int | str
DType = Literal["int64", "float32", "float16", "bfloat16", "float8e4m3fn", "int8", "int4", "float4e2m1"]
"""Element types; the last four only of quantized weights, and float8e4m3fn of the scales of float4e2m1."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(_Record):
    """The facts about the model that decoding needs.

    Attributes:
        eos_token_ids: any of them ends a text.
        block_size: the block length the model was trained with; the default block length.
        max_length: most tokens of prompt and answer together.
        max_block_length: longest block; the position tables reach ``max_length + max_block_length``.
        has_drafter: whether the draft graph has the adapter's branch and takes ``drafter_scale``.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mask_token_id: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    block_size: int
    max_length: int
    max_block_length: int
    has_drafter: bool

    @property
    def num_positions(self) -> int:
        """Rows of the position tables: a block that begins at the last token still has positions for all its slots."""
        return self.max_length + self.max_block_length


class TensorSpec(_Record):
    """Name, element type and shape of one graph input or output; a text in the shape is a dynamic dimension."""

    name: str
    dtype: DType
    shape: tuple[Dimension, ...]


class GraphContract(_Record):
    """Inputs and outputs of one role, without the cache, and how its rows attend to each other."""

    role: Role
    attention: Literal["causal", "bidirectional"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def cache_specs(model: ModelInfo, prefix: str, dtype: DType = "float32", capacity: Dimension = "capacity") -> tuple[TensorSpec, ...]:
    """Cache tensors in graph order, ``prefix`` being ``past_key_values`` or ``present``.

    ``dtype`` is what the graph computes in; ``capacity`` is a number in graphs for TensorRT, whose cache update wants it constant.
    """
    shape = ("batch", model.num_key_value_heads, capacity, model.head_dim)
    names = (f"{prefix}.{i}.{part}" for i in range(model.num_hidden_layers) for part in ("key", "value"))
    return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name in names)


def graph_contract(role: Role, model: ModelInfo) -> GraphContract:
    """The contract of one role.

    ``ar`` (causal): a prompt chunk or one token; ``input_length`` says how many of its rows are real (ragged batches are padded on the
    right), and logits and the greedy id are those of the last real row.
    ``draft`` (bidirectional in the block): per slot the five most probable ids of *that* slot, best first, and their probabilities under
    the full softmax. ``drafter_scale`` 1 switches the adapter on, 0 off.
    ``verify`` (causal): per row the greedy id and the logits of the *next* token; ``accepted_length`` counts the leading drafts
    ``input_ids[:, 1:]`` that equal the greedy ids before them.
    """
    ids = _spec("input_ids", "int64", "batch", "rows")
    past = _spec("past_length", "int64", "batch")
    if role == "ar":
        return GraphContract(
            role=role, attention="causal",
            inputs=(ids, past, _spec("input_length", "int64", "batch")),
            outputs=(_spec("greedy_ids", "int64", "batch"), _spec("logits", "float32", "batch", model.vocab_size)),
        )  # fmt: skip
    if role == "draft":
        top_k = min(TOP_K, model.vocab_size)
        return GraphContract(
            role=role, attention="bidirectional",
            inputs=(ids, past, *((_spec("drafter_scale", "float32"),) if model.has_drafter else ())),
            outputs=(_spec("top_ids", "int64", "batch", "rows", top_k), _spec("top_probabilities", "float32", "batch", "rows", top_k)),
        )  # fmt: skip
    return GraphContract(
        role=role, attention="causal",
        inputs=(ids, past),
        outputs=(_spec("greedy_ids", "int64", "batch", "rows"), _spec("accepted_length", "int64", "batch"),
                 _spec("logits", "float32", "batch", "rows", model.vocab_size)),
    )  # fmt: skip


def _spec(name: str, dtype: DType, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)
