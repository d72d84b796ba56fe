"""Computes with weights that stay in the checkpoint's files.

So a checkpoint may be larger than memory. A weight is a mapped range of its file, in the type that
it is stored in: pages that the kernel can drop and read again. It becomes float32, which is exact
for every stored type, right before its product, at most :data:`WIDENED_BYTES` at a time. Products
are those of the float32 trunk, bit for bit; of a weight larger than that, up to the order in which
its rows' sums are taken.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimode.calib.reference.torch_session import blank_trunk, drafter_shape
from trimode.formats.safetensors import ITEM_SIZES, TensorEntry
from trimode.graphs.adapter import FoldedEntry
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.decoder.trunk import Layer, LowRankLinear, TriModeTrunk

WIDENED_BYTES = 256 << 20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def mapped_tensor(entry: TensorEntry) -> Tensor:
    """Map a checkpoint's tensor where it lies, not to be written to.

    A small one that lies there in another form is read into memory.
    """
    if isinstance(entry, FoldedEntry):
        return torch.from_numpy(entry.values())
    # read-only: a private map would have to fit into memory
    raw = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.num_bytes,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to
        tensor = torch.from_numpy(raw)
    if entry.offset % ITEM_SIZES[entry.dtype]:
        tensor = tensor.clone()  # torch expects numbers at multiples of their size
    return tensor.view(_DTYPES[entry.dtype]).reshape(entry.shape)


def float32_tensor(entry: TensorEntry, device: str) -> Tensor:
    """Copy a checkpoint's tensor in float32."""
    return mapped_tensor(entry).to(device, torch.float32, copy=True)


def float32_bytes(checkpoint: Checkpoint) -> int:
    """Count the bytes of all weights in float32."""
    return sum(
        entry.num_bytes // ITEM_SIZES[entry.dtype] * 4 for entry in checkpoint.tensors.values()
    )


def open_trunk(
    checkpoint: Checkpoint, num_positions: int, device: str = "cpu", memory_bytes: int | None = None
) -> TriModeTrunk:
    """Open the trunk for inference, its weights in float32 or mapped.

    They are in float32 if these fit into ``memory_bytes`` (None = they do).

    Args:
        checkpoint: Opened checkpoint; its files have to stay as they are while the trunk is used.
        num_positions: Rows of the position tables.
        device: Device that computes. Mapped weights are sent there for each product.
        memory_bytes: Memory for weights that stay in memory.
    """
    trunk = blank_trunk(checkpoint, num_positions)
    if memory_bytes is not None and float32_bytes(checkpoint) > memory_bytes:
        _map_weights(trunk, "", checkpoint)
    _load(trunk, "", checkpoint, device)
    return trunk.to(device).eval()


def load_layer(checkpoint: Checkpoint, index: int, device: str = "cpu") -> Layer:
    """Load one decoder layer in float32, for inference.

    To an attention pattern it is layer 0, whichever it is.
    """
    rank, alpha = drafter_shape(checkpoint)
    with torch.device("meta"):
        layer = Layer(checkpoint.config, 0, rank, alpha)
    _load(layer, f"encoder.layers.{index}.", checkpoint, device)
    return layer.eval()


class MappedLinear(nn.Module):
    """Multiplies with a mapped weight ``(out, in)``, without bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, drafter_scale: Tensor | float | None = None) -> Tensor:  # noqa: ARG002
        """Multiply ``x (..., in)`` float32 -> ``(..., out)``.

        Without an adapter there is no branch that ``drafter_scale`` could multiply.
        """
        rows = max(1, WIDENED_BYTES // (4 * self.weight.shape[1]))
        starts = range(0, self.weight.shape[0], rows)
        products = [
            functional.linear(x, self.weight[i : i + rows].to(x.device, torch.float32))
            for i in starts
        ]
        return products[0] if len(products) == 1 else torch.cat(products, -1)


class MappedLowRankLinear(nn.Module):
    """Computes :class:`trimode.graphs.decoder.trunk.LowRankLinear` over mapped weights."""

    def __init__(
        self, base: MappedLinear, lora_a: MappedLinear, lora_b: MappedLinear, scaling: float
    ) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.scaling = base, lora_a, lora_b, scaling

    def forward(self, x: Tensor, drafter_scale: Tensor | float | None = None) -> Tensor:
        """Multiply, and add the branch where there is a ``drafter_scale``."""
        y: Tensor = self.base(x)
        if drafter_scale is None:
            return y
        return y + self.lora_b(self.lora_a(x) * (drafter_scale * self.scaling))  # type: ignore[no-any-return]


class MappedEmbedding(nn.Module):
    """Looks up ids in a mapped table ``(V, hidden_size)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up ids of any shape; the result is float32.

        It is ``(..., hidden_size)``, on the device of the ids.
        """
        return functional.embedding(input_ids.to(self.weight.device), self.weight).to(
            input_ids.device, torch.float32
        )


def _load(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: str) -> None:
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict(
        {name: float32_tensor(checkpoint.tensors[prefix + name], device) for name in names},
        assign=True,
    )
    module.requires_grad_(False)


def _map_weights(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Replace everything below ``module`` that has a matrix.

    Norms, whose weights are small, stay.
    """
    for name, child in module.named_children():
        mapped = _mapped(child, f"{prefix}{name}", checkpoint)
        if mapped is None:
            _map_weights(child, f"{prefix}{name}.", checkpoint)
        else:
            setattr(module, name, mapped)


def _mapped(module: nn.Module, path: str, checkpoint: Checkpoint) -> nn.Module | None:
    def linear(name: str) -> MappedLinear:
        return MappedLinear(mapped_tensor(checkpoint.tensors[f"{name}.weight"]))

    if isinstance(module, LowRankLinear):
        if module.lora_A is None:
            return linear(path)
        return MappedLowRankLinear(
            linear(path), linear(f"{path}.lora_A"), linear(f"{path}.lora_B"), module.scaling
        )
    if isinstance(module, nn.Linear):
        return linear(path)
    if isinstance(module, nn.Embedding):
        return MappedEmbedding(mapped_tensor(checkpoint.tensors[f"{path}.weight"]))
    return None
