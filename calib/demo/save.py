"""Writes the demo checkpoint: weights, tokenizer, chat template, generation defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimode.calib.demo.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    IM_END,
    SPECIAL_IDS,
    build_tokenizer,
    tokenizer_config,
)
from trimode.calib.training.checkpoint_writer import write_checkpoint
from trimode.graphs.decoder.trunk import TriModeTrunk


def save_demo(folder: Path, trunk: TriModeTrunk, config: dict[str, Any]) -> None:
    """Write a complete checkpoint folder; ``config`` is the contents of its ``config.json``."""
    write_checkpoint(folder, trunk, config, demo_texts())


def demo_texts() -> dict[str, str]:
    """Return the folder's files without weights, by name."""
    generation = {"bos_token_id": SPECIAL_IDS[BOS], "eos_token_id": [SPECIAL_IDS[IM_END]]}
    return {
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "tokenizer.json": build_tokenizer().to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config(), indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
