"""Writes a folder of ONNX Runtime GenAI: ``make_genai.py CHECKPOINT FOLDER THREADS``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel


def main(folder: Path, output: Path, threads: int) -> None:
    """Build in float32 for a CPU, as its own builder does; it asks for some tokenizer."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.save(str(folder / "tokenizer.json"))
    chosen = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(chosen))
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    places = ["-i", str(folder), "-o", str(output), "-c", str(output / "cache")]
    subprocess.run([*builder, *places, "-p", "fp32", "-e", "cpu"], check=True)
    path = output / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))


main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
