"""Defines the demo model: the family's traits at a small size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimode.calib.demo.tokenizer import BOS, IM_END, MASK, SPECIAL_IDS, VOCAB_SIZE
from trimode.graphs.config import parse_config
from trimode.graphs.decoder.trunk import TriModeTrunk

DRAFTER_RANK, DRAFTER_ALPHA = 128, 512.0  # as in the published checkpoints
INITIAL_STD = 0.04


def demo_config() -> dict[str, Any]:
    """Give the contents of ``config.json``.

    Heads times head size differs from the hidden size, and YaRN is at work from the first position
    on.
    """
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    return {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB_SIZE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": SPECIAL_IDS[BOS],
        "eos_token_id": SPECIAL_IDS[IM_END],
        "pad_token_id": None,
        "mask_token_id": SPECIAL_IDS[MASK],
        "block_size": 32,
        "dlm_paradigm": "bidirectional",
        "dlm_loss_weight": 0.3,
        "ar_loss_weight": 1.0,
        "dp_varying_mask_ratio": False,
        "attn_implementation": "sdpa",
        "dtype": "bfloat16",
        "use_cache": False,
        "initializer_range": INITIAL_STD,
    }


def build_trunk(config: dict[str, Any], seed: int) -> TriModeTrunk:
    """Build a fresh trunk with an idle drafter adapter."""
    torch.manual_seed(seed)
    parsed = parse_config(config)
    trunk = TriModeTrunk(
        parsed,
        parsed.max_position_embeddings,
        drafter_rank=DRAFTER_RANK,
        drafter_alpha=DRAFTER_ALPHA,
    )
    residual_std = INITIAL_STD / (2 * parsed.num_hidden_layers) ** 0.5
    for name, parameter in trunk.named_parameters():
        if parameter.ndim < 2 or "lora_" in name:
            continue
        nn.init.normal_(
            parameter,
            std=residual_std
            if name.endswith(("o_proj.weight", "down_proj.weight"))
            else INITIAL_STD,
        )
    return trunk
