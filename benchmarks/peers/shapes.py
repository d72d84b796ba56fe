"""Checkpoints of random weights: a Llama for the peers, and the same shape for trimode.

Speed does not depend on what weights say, so both are written from one random piece of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def num_parameters(self) -> int:
        """Numbers in the model, embedding and head included."""
        return sum(int(np.prod(shape)) for shape in llama_tensors(self).values())


SHAPES = {
    "tiny": Shape(256, 768, 2, 4, 2, 64, 2048),
    "120m": Shape(768, 2048, 12, 12, 4, 64, 32768),
    "1b": Shape(2048, 6144, 16, 16, 8, 128, 131072),
    "3b": Shape(3072, 9216, 26, 32, 8, 128, 131072),
}
"""``3b`` is the family's own; the others have its proportions."""


def llama_tensors(shape: Shape) -> Shapes:
    """Names and shapes of a Llama with a head of its own, as Hugging Face keeps them."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (query, shape.hidden),
        "self_attn.k_proj": (key, shape.hidden),
        "self_attn.v_proj": (key, shape.hidden),
        "self_attn.o_proj": (shape.hidden, query),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    layers = {
        f"model.layers.{index}.{name}.weight": size
        for index in range(shape.layers)
        for name, size in layer.items()
    }
    ends = {
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocab, shape.hidden),
    }
    return {"model.embed_tokens.weight": (shape.vocab, shape.hidden), **layers, **ends}


def write_llama(folder: Path, shape: Shape) -> None:
    """Write a checkpoint that transformers, genai's builder and converters to GGUF read."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_sizes(shape),
    }
    write_checkpoint(folder, config, llama_tensors(shape))


def write_trimode(folder: Path, shape: Shape) -> None:
    """Write a checkpoint of the family."""
    from trimode.graphs.checkpoint import expected_tensors
    from trimode.graphs.config import parse_config

    config = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "mask_token_id": 100,
        "eos_token_id": 11,
        "block_size": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        **_sizes(shape),
    }
    write_checkpoint(folder, config, expected_tensors(parse_config(config)))


def _sizes(shape: Shape) -> dict[str, Any]:
    names = {
        "hidden": "hidden_size",
        "inner": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab": "vocab_size",
    }
    sizes = {names[name]: value for name, value in asdict(shape).items()}
    return {**sizes, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def write_checkpoint(folder: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """One file in bfloat16; norms are ones, all else is random."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        places = [offset, offset + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": places}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for seed, shape in enumerate(shapes.values()):
            for piece in _numbers(shape, seed):
                stream.write(piece)


def _numbers(shape: tuple[int, ...], seed: int) -> Iterator[bytes]:
    """Bytes of bfloat16, the upper halves of float32.

    No two tensors are equal: some runtimes hold equal ones once, and read them from the cache.
    """
    count = int(np.prod(shape))
    if len(shape) == 1:
        yield np.full(count, 0x3F80, np.uint16).tobytes()
        return
    rng = np.random.default_rng(seed)
    piece = rng.standard_normal(min(count, 1 << 22), dtype=np.float32) * np.float32(0.02)
    halves = (piece.view(np.uint32) >> 16).astype(np.uint16)
    for begin in range(0, count, halves.size):
        yield halves[: count - begin].tobytes()
