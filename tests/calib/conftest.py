from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from trimode.calib.demo.model import demo_config
from trimode.calib.demo.tokenizer import build_tokenizer
from trimode.graphs.config import parse_config
from trimode.graphs.decoder.trunk import TriModeTrunk

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.fixture
def small_config() -> dict[str, Any]:
    return {
        **demo_config(),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "block_size": 8,
    }


@pytest.fixture
def small_trunk(small_config: dict[str, Any]) -> TriModeTrunk:
    """Weights large enough for attention and the adapter to matter."""
    torch.manual_seed(5)
    trunk = TriModeTrunk(parse_config(small_config), 256, drafter_rank=4, drafter_alpha=16.0)
    for name, parameter in trunk.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if name == "diffusion_head.weight" else 0.15)
    return trunk
