"""G4 and G7: the torch trunk on the GPU, eager and as CUDA graphs, beside the bandwidth of the same
run: the yardstick for every engine.

python -m benchmarks.gpu.g4_torch [--size 8b] [--batches 1,2,4,...,128] [--device cpu --size tiny]

Milliseconds a forward for 1, 8, 16 and 32 rows after 512 and 4096 cached tokens, batch 1; then (G7)
for batches of `--batches` after 512. The floor is the bytes of the weights that a forward reads,
over the bandwidth of a large copy measured in this run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.build_scale import write_sparse_checkpoint
from benchmarks.gpu.common import (
    PASTS,
    ROWS,
    TINY,
    arguments,
    median_ms,
    save,
    show,
    write_tiny_checkpoint,
)
from trimode.graphs.config import ModelConfig, parse_config
from trimode.graphs.decoder.trunk import TriModeTrunk


class SlotAttention:
    """A cache of fixed slots, written in place at ``past``, read up to there: fixed shapes, so a
    forward can be captured.
    """

    def __init__(
        self, config: ModelConfig, batch: int, past: int, rows: int, device: str, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.num_key_value_heads, past + rows, config.head_dim)
        self.cache = [
            [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
            for _ in range(config.num_hidden_layers)
        ]
        self.past = past
        self.mask = (
            torch.ones(rows, past + rows, dtype=torch.bool, device=device).tril(past)
            if rows > 1
            else None
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key, value = self.cache[layer]
        key[:, :, self.past :], value[:, :, self.past :] = k, v
        return functional.scaled_dot_product_attention(
            q, key, value, attn_mask=self.mask, enable_gqa=True
        )


def make_trunk(size: str, device: str, dtype: torch.dtype, num_positions: int) -> TriModeTrunk:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        write_tiny_checkpoint(folder) if size == TINY else write_sparse_checkpoint(folder, size)
        config = parse_config(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        trunk = TriModeTrunk(config, num_positions)
    trunk = trunk.to(dtype).to_empty(device=device)
    for parameter in trunk.parameters():
        parameter.data.normal_(0, 0.02)
    trunk.rope = type(trunk.rope)(config, num_positions).to(device)
    return trunk.eval()


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes read and written a second by a copy inside the device's memory."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), _wait(device))
    return 2 * num_bytes / (ms / 1e3)


def _wait(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def captured(forward: Callable[[], object]) -> Callable[[], object]:
    """The forward recorded as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


@torch.inference_mode()
def measure(
    trunk: TriModeTrunk, batch: int, rows: int, past: int, device: str, repeats: int
) -> dict[str, Any]:
    """One cell of the table; every row's logits are computed, as in `verify`."""
    dtype = next(trunk.parameters()).dtype
    attend = SlotAttention(trunk.config, batch, past, rows, device, dtype)
    ids = torch.randint(0, trunk.config.vocab_size, (batch, rows), device=device)
    positions = torch.arange(past, past + rows, device=device).expand(batch, rows)

    def forward() -> object:
        return trunk.head(trunk(ids, positions, attend)).argmax(-1)

    cell: dict[str, Any] = {
        "batch": batch,
        "rows": rows,
        "past": past,
        "eager_ms": median_ms(forward, _wait(device), repeats),
    }
    if device == "cuda":
        cell["graph_ms"] = median_ms(captured(forward), _wait(device), repeats)
    return cell


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128")
    options = parser.parse_args()
    tiny, device = options.size == TINY, options.device
    pasts, repeats = ((64,), 3) if tiny else (PASTS, 20)
    trunk = make_trunk(options.size, device, torch.bfloat16, max(pasts) + 64)
    read = sum(
        p.numel() * p.element_size()
        for name, p in trunk.named_parameters()
        if "embed_tokens" not in name
    )
    bandwidth = copy_bandwidth(device, 1 << 24 if tiny else 1 << 32)
    floor_ms = 1e3 * read / bandwidth
    cells = [measure(trunk, 1, rows, past, device, repeats) for past in pasts for rows in ROWS]
    batches = [int(part) for part in options.batches.split(",")][: 2 if tiny else None]
    concurrent: list[dict[str, Any]] = []
    for batch in batches:
        for rows in ROWS:
            try:
                concurrent.append(measure(trunk, batch, rows, pasts[0], device, repeats))
            except torch.OutOfMemoryError as error:
                concurrent.append(
                    {
                        "batch": batch,
                        "rows": rows,
                        "past": pasts[0],
                        "error": str(error).splitlines()[0],
                    }
                )
    for cell in (*cells, *concurrent):
        best = cell.get("graph_ms", cell.get("eager_ms"))
        cell["floor_over_best"] = floor_ms / best if best else None
    facts = {
        "size": options.size,
        "weight_bytes_read": read,
        "copy_bytes_per_s": bandwidth,
        "floor_ms": floor_ms,
    }
    save("g4_torch", {**facts, "batch_1": cells, "batches": concurrent})
    print(
        f"weights read {read / 1e9:.2f} GB, copy {bandwidth / 1e12:.3f} TB/s, floor "
        f"{floor_ms:.3f} ms"
    )
    show(
        [*cells, *concurrent], ("batch", "rows", "past", "eager_ms", "graph_ms", "floor_over_best")
    )


if __name__ == "__main__":
    main()
