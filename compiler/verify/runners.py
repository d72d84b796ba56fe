"""Runs a session or the trunk under Polygraphy.

The trunk's runner takes what a portable graph takes.

Their inputs and outputs are those of the tensor contract, so they stand beside Polygraphy's own
runners in one comparison.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from trimode.calib.reference.torch_session import TorchCache, TorchSession, led_by_causal
from trimode.compiler.verify.rounding import GraphCodes, Guide, scales_name
from trimode.formats.contract import GraphContract, GraphName, ModelInfo, TensorSpec, cache_specs
from trimode.formats.verification import CodesRecord
from trimode.runtime.decode.sequence import PREFILL_CHUNK
from trimode.runtime.sessions.base import Ids, Session

Feed = dict[str, NDArray[Any]]

HEAD = "diffusion_head"
"""The layer whose rows are not those of all others."""


class CachedText:
    """Holds a text and the cache of a session that reads it.

    Args:
        session: Session that reads it.
        token_ids: Tokens of the text, (n,) int64.
    """

    def __init__(self, session: Session, token_ids: Ids) -> None:
        self.session = session
        self.token_ids = token_ids
        self.cache = session.new_cache()
        self.length = 0

    def read_to(self, length: int) -> None:
        """Let the cache hold the first ``length`` tokens.

        What lies behind them may be anything.
        """
        chunk = min(PREFILL_CHUNK, self.session.max_prefill_rows or PREFILL_CHUNK)
        while self.length < length:
            ids = self.token_ids[None, self.length : min(self.length + chunk, length)]
            self.session.run("ar", self.cache, ids, self.length)
            self.length += ids.shape[1]
        self.length = length


class SessionRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is not typed
    """Runs one graph of a session behind part of a text.

    It stands after the first ``past_length`` tokens, and takes the contract's inputs, batch 1.

    Args:
        name: Name shown in reports.
        text: Text that the session reads; several runners may share it.
        contract: Contract of the graph.
    """

    def __init__(self, name: str, text: CachedText, contract: GraphContract) -> None:
        super().__init__(name=name)
        self._text = text
        self._contract = contract

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes of the contract's inputs."""
        return metadata(self._contract.inputs)

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        """The contract's outputs, copied."""
        past_length = int(feed_dict["past_length"][0])
        self._text.read_to(past_length)
        start = time.perf_counter()
        scale = float(feed_dict.get("drafter_scale", np.float32(0)))
        outputs = self._text.session.run(
            self._contract.graph_name, self._text.cache, feed_dict["input_ids"], past_length, scale
        )
        named = OrderedDict(
            (spec.name, np.array(output))
            for spec, output in zip(self._contract.outputs, outputs, strict=True)
        )
        self.inference_time = time.perf_counter() - start
        return named


class TrunkRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is not typed
    """Runs the trunk as if it were a portable graph.

    It takes a batch of sequences of different length. The cache is inputs and outputs of fixed
    capacity.

    Args:
        name: Name shown in reports.
        session: Session of the reference.
        model: Sizes of the cache.
        contract: Contract of the graph.
        guided: Guide of the trunk, the runner whose codes it follows, which has run the same inputs
            before, and the bound of their values, relative; None where inputs are not quantized.
    """

    def __init__(
        self,
        name: str,
        session: TorchSession,
        model: ModelInfo,
        contract: GraphContract,
        guided: tuple[Guide, CodedRunner, float] | None = None,
    ) -> None:
        super().__init__(name=name)
        self._guided = guided
        self.codes: CodesRecord | None = None
        self._session = session
        self._contract = contract
        self._pasts = cache_specs(model, "past_key_values")

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes of the contract's inputs and of the cache."""
        return metadata((*self._contract.inputs, *self._pasts))

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        """The contract's outputs and the updated cache, ``present.{i}.key|value (B, G, C, D)``."""
        start = time.perf_counter()
        self.codes = None
        present = [feed_dict[spec.name].copy() for spec in self._pasts]
        rows = [
            self._one(feed_dict, index, present) for index in range(len(feed_dict["input_ids"]))
        ]
        named = OrderedDict(
            (spec.name, np.concatenate(parts))
            for spec, parts in zip(self._contract.outputs, zip(*rows, strict=True), strict=True)
        )
        named.update(
            (spec.name.replace("past_key_values", "present"), tensor)
            for spec, tensor in zip(self._pasts, present, strict=True)
        )
        self.inference_time = time.perf_counter() - start
        return named

    def _one(
        self, feed: Mapping[str, NDArray[Any]], index: int, present: list[NDArray[Any]]
    ) -> tuple[NDArray[Any], ...]:
        """Run sequence ``index`` of the batch alone.

        Its new keys and values go to ``present``.
        """
        past, ids = int(feed["past_length"][index]), feed["input_ids"][index : index + 1]
        tensors = [
            torch.from_numpy(tensor[index : index + 1, :, :past].copy()) for tensor in present
        ]
        cache = TorchCache.of(list(zip(tensors[::2], tensors[1::2], strict=True)))
        real = int(feed["input_length"][index]) if "input_length" in feed else None
        if self._contract.graph_name == "quadratic":
            return self._quadratic(cache, ids, past, index, present)
        with self._following(index):
            outputs = self._session.forward(
                self._contract.graph_name,
                cache,
                ids,
                past,
                float(feed.get("drafter_scale", np.float32(0))),
                real,
            )
        _keep(cache, present, index, past, past)
        return outputs

    def _quadratic(
        self, cache: TorchCache, ids: Ids, past: int, index: int, present: list[NDArray[Any]]
    ) -> tuple[NDArray[Any], ...]:
        """Compute the outputs of ``quadratic`` by several forwards.

        One is over the draft, and one over the masked slots of each of its tokens, in the order of
        the rows.
        """
        rows = ids.shape[1]
        with self._following(index, slice(rows), _of_head(slice(rows))):
            greedy, accepted, logits = self._session.forward("verify", cache, ids, past)
        _keep(cache, present, index, past, past)
        tokens, last = cache.layers, int(accepted[0])
        for token in range(rows):
            cache.replace(tokens)
            end, begin = past + token + 1, rows + token * rows
            # Of the slots the graph's head sees those behind the last accepted token but the first,
            # where it sees that token's own row.
            heads = slice(rows + 1, 2 * rows) if token == last else slice(0)
            with self._following(index, slice(begin, begin + rows), _of_head(heads)):
                drafted = self._session.drafts_behind(cache, end, rows)
            _keep(cache, present, index, end, past + begin)
            if token == last:
                candidates = drafted
        return greedy, accepted, logits, *led_by_causal(*candidates, logits[:, last])

    @contextlib.contextmanager
    def _following(
        self, index: int, rows: slice = slice(None), other: Mapping[str, slice] | None = None
    ) -> Iterator[None]:
        """Let the trunk take the codes that the graph chose.

        They are those of ``rows`` of sequence ``index``; in some layers of ``other`` rows.
        """
        if self._guided is None:
            yield
            return
        guide, graph, relative = self._guided
        chosen = GraphCodes(
            {
                layer: codes[index, (other or {}).get(layer, rows)]
                for layer, codes in graph.codes.items()
            }
        )
        with guide.asking(chosen, relative):
            yield
        self.codes = chosen.add_to(self.codes)


def _of_head(rows: slice) -> dict[str, slice]:
    return {HEAD: rows, scales_name(HEAD): rows}


def _keep(
    cache: TorchCache, present: list[NDArray[Any]], index: int, begin: int, slot: int
) -> None:
    """Copy a cache from ``begin`` on into row ``index``.

    The fixed caches are written from ``slot`` on.
    """
    for tensor, new in zip(
        present, (part for layer in cache.layers for part in layer), strict=True
    ):
        tensor[index, :, slot : slot + new.shape[2] - begin] = new[0, :, begin:].numpy()


def portable_runner(name: str, path: Path) -> Any:
    """Make Polygraphy's own runner for a portable graph.

    ONNX Runtime runs it as the file says it, without optimizations or copies of the weights.

    It runs as the file says it, without optimizations or copies of the weights.
    """
    return OnnxrtRunner(lambda: _open_portable(path), name=name)


class CodedRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is not typed
    """Runs a portable graph and returns its quantized inputs.

    Each QuantizeLinear's result is an output as well; for nvfp4, what follows it.

    Attributes:
        codes: Codes of the last run, by layer, as numbers, ``(B, rows, in)`` float32; for nvfp4
            ``(B, rows, in / 16, 16)``, and for the blocks' scales ``(B, rows, in / 16, 1)``. Where
            a layer is multiplied twice, the rows of both products.
    """

    def __init__(self, name: str, path: Path, contract: GraphContract, model: ModelInfo) -> None:
        super().__init__(name=name)
        self._path, self._inputs = path, (*contract.inputs, *cache_specs(model, "past_key_values"))
        self._outputs = [spec.name for spec in (*contract.outputs, *cache_specs(model, "present"))]
        self.codes: dict[str, NDArray[Any]] = {}

    def activate_impl(self) -> None:
        """Open the graph."""
        graph, self._layers = _with_codes(self._path)
        self._session = _open_portable(self._path, graph)

    def deactivate_impl(self) -> None:
        """Close it."""
        del self._session

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes of the contract's inputs and of the cache."""
        return metadata(self._inputs)

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        """The contract's outputs and the updated cache; the codes are kept."""
        start = time.perf_counter()
        results = self._session.run([*self._outputs, *self._layers], dict(feed_dict))
        self.inference_time = time.perf_counter() - start
        count = len(self._outputs)
        several: dict[str, list[NDArray[Any]]] = {}
        for layer, codes in zip(self._layers.values(), results[count:], strict=True):
            several.setdefault(layer, []).append(
                codes.reshape(len(feed_dict["input_ids"]), -1, *codes.shape[1:])
            )
        self.codes = {layer: np.concatenate(parts, axis=1) for layer, parts in several.items()}
        return OrderedDict(zip(self._outputs, results[:count], strict=True))


def _with_codes(path: Path) -> tuple[bytes, dict[str, str]]:
    """Add an output in float32 for each quantized input.

    Also returns the layers by these outputs' names.
    """
    model = onnx.load(path, load_external_data=False)
    layers: dict[str, str] = {}

    def see(value: str, layer: str) -> None:
        name = f"codes.{len(layers)}"
        layers[name] = layer
        model.graph.node.append(
            onnx.helper.make_node("Cast", [value], [name], to=onnx.TensorProto.FLOAT)
        )
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )

    nodes = list(model.graph.node)
    made_by = {output: node for node in nodes for output in node.output}
    for node in [node for node in nodes if node.op_type == "QuantizeLinear"]:
        # By the scale it reads, not by what the node is called.
        scale = made_by.get(node.input[1])
        if scale is None:
            see(node.output[0], node.input[1].removesuffix(".input_scale"))
        else:  # nvfp4: the scale is multiplied by 6, and what is quantized are scales
            layer = scale.input[0].removesuffix(".input_scale")
            see(node.output[0], scales_name(layer))
            see(_multiplied(node.output[0], nodes), layer)
    return model.SerializeToString(), layers


def _multiplied(blocks: str, nodes: list[onnx.NodeProto]) -> str:
    """Numbers of four bits that a product multiplies by block scales."""
    (scales,) = (
        node.output[0]
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input[0] == blocks
    )
    (codes,) = (
        node.input[0] for node in nodes if node.op_type == "Mul" and node.input[1] == scales
    )
    return str(codes)


def _open_portable(path: Path, graph: bytes | None = None) -> Any:
    """Open a session over a portable graph, or over ``graph`` instead."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # it would say at every call that the cache is not updated in place
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return ort.InferenceSession(
        path if graph is None else graph, options, providers=["CPUExecutionProvider"]
    )


def metadata(specs: Iterable[TensorSpec]) -> Any:
    """Tensor specifications as Polygraphy writes them; a dynamic dimension is -1."""
    meta = TensorMetadata()
    for spec in specs:
        meta.add(
            spec.name,
            np.dtype(spec.dtype),
            tuple(-1 if isinstance(d, str) else d for d in spec.shape),
        )
    return meta


def graph_feed(
    graph_name: GraphName,
    model: ModelInfo,
    input_ids: Ids,
    past_length: Ids,
    drafter_scale: float = 0.0,
    input_length: Ids | None = None,
) -> Feed:
    """Make the contract's inputs of a graph.

    These are ``input_ids (B, T)``, ``past_length (B,)``, and ``input_length (B,)``: all rows if
    left out.
    """
    feed: Feed = {
        "input_ids": input_ids.astype(np.int64),
        "past_length": past_length.astype(np.int64),
    }
    if graph_name == "ar":
        feed["input_length"] = (
            np.full(len(input_ids), input_ids.shape[1], np.int64)
            if input_length is None
            else input_length.astype(np.int64)
        )
    if graph_name == "draft" and model.has_drafter:
        feed["drafter_scale"] = np.array(drafter_scale, np.float32)
    return feed
