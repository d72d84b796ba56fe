"""Declares the tensor contract: inputs and outputs of each graph.

The compiler writes it and the runtime reads it.

Three graphs over one set of weights, and a fourth that a bundle may have. ``B`` batch, ``T`` new
tokens, ``C`` cache capacity, ``G`` key/value heads, ``D`` head size, ``V`` vocabulary. Every graph
also takes ``past_key_values.{i}.key|value`` and returns ``present.{i}.key|value``, ``(B, G, C,
D)``, which may be the same memory. K/V land in the :func:`slots_written` slots from ``past_length``
on: one a row, and for ``quadratic`` T * T more behind the tokens'. Nothing else of the cache
changes, so rolling back is not advancing ``past_length``.

This module imports neither torch nor onnx.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from trimode.formats.record import Record

GraphName = Literal["ar", "draft", "verify", "quadratic"]
GRAPH_NAMES: tuple[GraphName, ...] = ("ar", "draft", "verify")
"""Graphs that every bundle has."""

TOP_K = 5
"""Candidates a draft graph returns per slot: what the confidence policies and the learned sampler
read.
"""

SCRATCH = "scratch"
"""How the names of outputs begin that a compiled graph has beside the contract's, and that nobody
reads.
"""

MAX_BLOCK_LENGTH = 64
"""Slots of the longest block that a bundle takes."""

Dimension = int | str
DType = Literal[
    "int64", "bool", "float32", "float16", "bfloat16", "float8e4m3fn", "int8", "int4", "float4e2m1"
]
"""Element types; bool only of the sampler's flags, the last four only of quantized weights, and
float8e4m3fn of the scales of float4e2m1.
"""

DEFAULT_MAX_LENGTH = 32768

Mode = Literal["ar", "diffusion", "linear_spec", "quadratic_spec", "auto"]


class ModelInfo(Record):
    """Holds the facts about the model that decoding needs.

    Attributes:
        vocab_size: Number of tokens in the vocabulary.
        hidden_size: Size of a hidden state.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        head_dim: Size of a head.
        mask_token_id: Token of a slot that is not filled yet.
        bos_token_id: Token that begins a text, if any.
        eos_token_ids: Tokens that end a text.
        block_size: Block length of the training, which is the default block length.
        max_length: Limit on the tokens of prompt and answer together.
        max_block_length: Limit on the block length; the position tables reach
            ``max_length + max_block_length``.
        has_drafter: True if the draft graph has the adapter's branch and takes ``drafter_scale``.
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
        """Return the number of rows of the position tables.

        A block that begins at the last token still has positions for all its slots.
        """
        return self.max_length + self.max_block_length

    @property
    def max_quadratic_length(self) -> int:
        """Longest block of ``quadratic``.

        The slots behind its last token reach nearly two blocks beyond what is cached, and ONNX
        Runtime refuses to rotate more rows than the position tables have.
        """
        most = self.max_block_length // 2
        return max(
            (n for n in range(1, most + 1) if slots_written("quadratic", n) <= self.num_positions),
            default=0,
        )


class TensorSpec(Record):
    """Holds name, element type and shape of a graph input or output.

    A text in the shape is a dynamic dimension.
    """

    name: str
    dtype: DType
    shape: tuple[Dimension, ...]


class GraphContract(Record):
    """Declares inputs and outputs of one graph, without the cache.

    Attributes:
        graph_name: Name of the graph; the key is ``"role"`` in a file.
        attention: Pattern in which its tokens attend to each other.
        inputs: Inputs in graph order.
        outputs: Outputs in graph order.
    """

    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    graph_name: GraphName = Field(validation_alias="role", serialization_alias="role")
    attention: Literal["causal", "bidirectional", "quadratic"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def slots_written(graph_name: GraphName, rows: int) -> int:
    """Number of cache slots that a forward writes, from ``past_length`` on.

    Args:
        graph_name: Name of the graph.
        rows: Number of new tokens.
    """
    return rows * (rows + 1) if graph_name == "quadratic" else rows


def cache_specs(
    model: ModelInfo, prefix: str, dtype: DType = "float32", capacity: Dimension = "capacity"
) -> tuple[TensorSpec, ...]:
    """Cache tensors in graph order, ``prefix`` being ``past_key_values`` or ``present``.

    ``dtype`` is what the graph computes in; ``capacity`` is a number in graphs for TensorRT, whose
    cache update wants it constant.
    """
    shape = ("batch", model.num_key_value_heads, capacity, model.head_dim)
    names = (
        f"{prefix}.{i}.{part}" for i in range(model.num_hidden_layers) for part in ("key", "value")
    )
    return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name in names)


def graph_contract(graph_name: GraphName, model: ModelInfo) -> GraphContract:
    """The contract of one graph.

    ``ar`` (causal): a prompt chunk or one token; ``input_length`` says how many of its rows are
    real (ragged batches are padded on the right), and logits and the greedy id are those of the
    last real row. ``draft`` (bidirectional in the block): per slot the five most probable ids of
    *that* slot, best first, and their probabilities under the full softmax. ``drafter_scale`` 1
    switches the adapter on, 0 off. ``verify`` (causal): per row the greedy id and the logits of the
    *next* token; ``accepted_length`` counts the leading drafts ``input_ids[:, 1:]`` that equal the
    greedy ids before them. ``quadratic`` (:mod:`trimode.graphs.decoder.quadratic`): ``verify`` and
    ``draft`` at once, without the adapter. ``input_ids`` are drafts of which the first is right;
    besides what ``verify`` returns, the candidates of the ``T`` tokens behind the last accepted
    one, the first of them its causal prediction.
    """
    ids = _spec("input_ids", "int64", "batch", "rows")
    past = _spec("past_length", "int64", "batch")
    if graph_name == "ar":
        return GraphContract(
            graph_name=graph_name,
            attention="causal",
            inputs=(ids, past, _spec("input_length", "int64", "batch")),
            outputs=(
                _spec("greedy_ids", "int64", "batch"),
                _spec("logits", "float32", "batch", model.vocab_size),
            ),
        )
    top_k = min(TOP_K, model.vocab_size)
    candidates = (
        _spec("top_ids", "int64", "batch", "rows", top_k),
        _spec("top_probabilities", "float32", "batch", "rows", top_k),
    )
    if graph_name == "draft":
        return GraphContract(
            graph_name=graph_name,
            attention="bidirectional",
            inputs=(
                ids,
                past,
                *((_spec("drafter_scale", "float32"),) if model.has_drafter else ()),
            ),
            outputs=candidates,
        )
    verified = (
        _spec("greedy_ids", "int64", "batch", "rows"),
        _spec("accepted_length", "int64", "batch"),
        _spec("logits", "float32", "batch", "rows", model.vocab_size),
    )
    if graph_name == "verify":
        return GraphContract(
            graph_name=graph_name, attention="causal", inputs=(ids, past), outputs=verified
        )
    return GraphContract(
        graph_name=graph_name,
        attention="quadratic",
        inputs=(ids, past),
        outputs=(*verified, *candidates),
    )


def joint_contract(model: ModelInfo) -> GraphContract:
    """Return the contract of one engine that is ``ar``, ``draft`` and ``verify``.

    ``is_causal`` 1 attends as ``ar`` and ``verify`` do, 0 as ``draft``. The outputs are those of a
    *window* of each sequence's rows, at most :data:`MAX_BLOCK_LENGTH`, that ends at the last real
    one: candidates, of which the first is the greedy id, and logits.
    """
    draft = graph_contract("draft", model)
    ids, past, *rest = draft.inputs
    inputs = (
        ids,
        past,
        *rest,
        _spec("input_length", "int64", "batch"),
        _spec("is_causal", "int64"),
    )
    candidates = (
        spec.model_copy(update={"shape": ("batch", "window", *spec.shape[2:])})
        for spec in draft.outputs
    )
    logits = _spec("logits", "float32", "batch", "window", model.vocab_size)
    return draft.model_copy(update={"inputs": inputs, "outputs": (*candidates, logits)})


def sampler_contract() -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the contract of the learned sampler's graph.

    Inputs are a block, its masked slots, and the outputs of a denoising forward. It has no cache.
    """
    inputs = (
        _spec("input_ids", "int64", "batch", "rows"),
        _spec("masked", "bool", "batch", "rows"),
        _spec("top_ids", "int64", "batch", "rows", TOP_K),
        _spec("top_probabilities", "float32", "batch", "rows", TOP_K),
    )
    return inputs, (_spec("scores", "float32", "batch", "rows"),)


def _spec(name: str, dtype: DType, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)
