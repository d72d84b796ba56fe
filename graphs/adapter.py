"""Opens a drafter adapter as PEFT writes it.

Every layer gets a branch of one rank and one scale.

The graphs have one rank and one scale for all layers. Where an adapter has several, its tensors are
folded while they are read: a smaller rank is filled up with zeros, a branch that a layer does not
have is all zeros, and the rest of the scale is multiplied into ``lora_B``. The multiplication is
exact for powers of two, and within half a unit of float32's last place otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.errors import CheckpointError
from trimode.formats.json_fields import named, shown
from trimode.formats.safetensors import (
    TensorEntry,
    check_readable,
    read_safetensors_header,
    to_float32,
)
from trimode.graphs.adapter_config import ADAPTER_HINT, AdapterConfig, read_adapter_config
from trimode.graphs.config import ModelConfig

ADAPTER_FOLDER = "linear_spec_lora"
ADAPTER_PREFIX = "base_model.model."
# A state dict of PEFT's model has the adapter's name behind lora_A; a wrapper adds a model. in
# front.
_SPELLING = re.compile(
    r"(?:base_model\.model\.)?(?P<wrapper>(?:model\.)*)(?P<module>encoder\.layers\.\d+\.self_attn\.o_proj)"
    r"\.(?P<half>lora_[AB])(?P<adapter>\.[^.]+)?\.weight"
)
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_SAVE_HINT = (
    "save the adapter alone with PEFT's save_pretrained; "
    "it may have lora_A and lora_B of o_proj and nothing else"
)


@dataclass(frozen=True)
class Drafter:
    """Holds the shape of the draft graph's adapter (LoRA on ``o_proj``).

    Its branch is scaled by ``alpha / rank``.
    """

    rank: int
    alpha: float


@dataclass(frozen=True)
class FoldedEntry(TensorEntry):
    """Holds a tensor of an adapter in another form than the file's.

    It is float32, filled up with zeros, times ``factor``.

    ``file`` is where it came from; ``offset`` has no meaning.

    Attributes:
        source: Tensor in the file; None = zeros.
    """

    source: TensorEntry | None
    factor: float

    def values(self) -> NDArray[np.float32]:
        """The tensor, ``shape`` float32."""
        whole = np.zeros(self.shape, np.float32)
        if self.source is not None:
            rows, columns = self.source.shape
            stored = to_float32(b"".join(self.source.chunks()), self.source.dtype).reshape(
                rows, columns
            )
            whole[:rows, :columns] = stored * np.float64(self.factor)
        return whole

    def chunks(self, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """Yield the tensor's bytes in order, ``chunk_bytes`` at a time."""
        raw = self.values().astype("<f4").tobytes()
        return (raw[start : start + chunk_bytes] for start in range(0, len(raw), chunk_bytes))


class _Branch(NamedTuple):
    a: TensorEntry
    b: TensorEntry
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def open_adapter(folder: Path, config: ModelConfig) -> tuple[Drafter, dict[str, TensorEntry]]:
    """Open an adapter folder without reading any weight.

    Returns:
        The branch's shape, and its tensors by the trunk's names,
            ``encoder...o_proj.lora_A.weight``.

    Raises:
        CheckpointError: a file is missing or malformed, a tensor is missing, unknown or of another
            shape, or the adapter is one that the graphs do not compute.
    """
    settings = read_adapter_config(folder / "adapter_config.json")
    tensors, wrapper = _trunk_names(_read_tensors(folder), folder)
    branches = _branches(settings, tensors, wrapper, config, folder)
    return _fold(branches, config)


def expected_adapter_tensors(config: ModelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the drafter's weights, without the adapter file's prefix."""
    return {
        f"{module}.lora_{half}.weight": shape
        for module in _modules(config)
        for half, shape in (("A", (rank, config.query_size)), ("B", (config.hidden_size, rank)))
    }


def _modules(config: ModelConfig) -> list[str]:
    return [f"encoder.layers.{i}.self_attn.o_proj" for i in range(config.num_hidden_layers)]


def _read_tensors(folder: Path) -> dict[str, TensorEntry]:
    path, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not path.exists() and pickled.exists():
        raise CheckpointError(
            f"{folder}: expected adapter_model.safetensors, "
            "found adapter_model.bin, a pickle, which trimode does not open",
            "load the adapter with PEFT and save it again "
            "with save_pretrained(DIR, safe_serialization=True)",
        )
    return read_safetensors_header(path, ADAPTER_HINT)


def _trunk_names(
    found: Mapping[str, TensorEntry], folder: Path
) -> tuple[dict[str, TensorEntry], str]:
    """Name the tensors as the trunk does, and give the wrapper's name.

    That is what stands in front of them in the model that was trained.
    """
    tensors: dict[str, TensorEntry] = {}
    spelled: dict[tuple[str, str], str] = {}
    for name, entry in found.items():
        match = _SPELLING.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{folder}: expected the tensors of LoRA on o_proj, found {named(name)}", _SAVE_HINT
            )
        short = f"{match['module']}.{match['half']}.weight"
        spelled.setdefault((match["wrapper"], match["adapter"] or ""), name)
        if short in tensors or len(spelled) > 1:
            first = next(iter(spelled.values()))
            raise CheckpointError(
                f"{folder}: expected one adapter, its tensors named alike, "
                f"found {named(first)} and {named(name)}",
                _SAVE_HINT,
            )
        check_readable(name, entry)
        tensors[short] = entry
    wrapper = next(iter(spelled), ("", ""))[0]
    return tensors, wrapper


def _branches(
    settings: AdapterConfig,
    tensors: dict[str, TensorEntry],
    wrapper: str,
    config: ModelConfig,
    folder: Path,
) -> dict[str, _Branch]:
    """Collect the branch of each layer that has one.

    Every tensor is part of one, and each branch is complete.
    """
    _check_targets(settings, wrapper, config, folder)
    branches = {}
    left = dict(tensors)
    for module in _modules(config):
        name = wrapper + module
        if not settings.has_branch(name):
            continue
        rank = settings.rank(name)
        a = _take(left, f"{module}.lora_A.weight", (rank, config.query_size), folder)
        b = _take(left, f"{module}.lora_B.weight", (config.hidden_size, rank), folder)
        branches[module] = _Branch(a, b, rank, settings.alpha(name))
    if left:
        raise CheckpointError(
            f"{folder}: expected tensors of the projections that target_modules means, "
            f"found {next(iter(left))}",
            "check that adapter_config.json and the tensors belong to the same adapter, "
            "and the adapter to this checkpoint",
        )
    return branches


def _check_targets(
    settings: AdapterConfig, wrapper: str, config: ModelConfig, folder: Path
) -> None:
    path = folder / "adapter_config.json"
    hint = "only an adapter on o_proj can be a drafter"
    if not any(settings.has_branch(wrapper + module) for module in _modules(config)):
        raise CheckpointError(
            f"{path}: expected target_modules that mean o_proj, "
            f"found {shown(settings.target_modules)}",
            hint,
        )
    # what was trained is what has tensors, and those are of o_proj alone
    if settings.target_modules == "all-linear":
        return
    others = [
        f"encoder.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in _LINEARS
    ]
    for module in (*others, "encoder.embed_tokens", "diffusion_head"):
        if settings.has_branch(wrapper + module):
            raise CheckpointError(
                f"{path}: expected target_modules that mean o_proj alone, "
                f"found that they mean {module}",
                hint,
            )


def _take(
    left: dict[str, TensorEntry], name: str, shape: tuple[int, ...], folder: Path
) -> TensorEntry:
    hint = (
        "check that adapter_config.json and the tensors belong to the same adapter, "
        "and the adapter to this checkpoint"
    )
    entry = left.pop(name, None)
    if entry is None:
        raise CheckpointError(
            f"{folder}: expected the tensor {name}, found that it is missing", hint
        )
    if entry.shape != shape:
        raise CheckpointError(
            f"{folder}: expected {name} of shape {list(shape)}, found {list(entry.shape)}", hint
        )
    return entry


def _fold(
    branches: dict[str, _Branch], config: ModelConfig
) -> tuple[Drafter, dict[str, TensorEntry]]:
    """All branches in one rank, the largest, and one scale, the largest."""
    rank = max(branch.rank for branch in branches.values())
    largest = max(branches.values(), key=lambda branch: abs(branch.scale))
    alpha = largest.alpha if largest.rank == rank else largest.scale * rank
    file = largest.a.file
    shapes = expected_adapter_tensors(config, rank)
    tensors: dict[str, TensorEntry] = {}
    for module in _modules(config):
        branch = branches.get(module)
        for half in ("A", "B"):
            name = f"{module}.lora_{half}.weight"
            source = None if branch is None else branch.a if half == "A" else branch.b
            is_scaled = branch is not None and half == "B" and branch.scale != largest.scale
            factor = branch.scale / largest.scale if branch is not None and is_scaled else 1.0
            tensors[name] = _in_shape(source, shapes[name], factor, file)
    return Drafter(rank, alpha), tensors


def _in_shape(
    source: TensorEntry | None, shape: tuple[int, ...], factor: float, file: Path
) -> TensorEntry:
    if source is not None and source.shape == shape and factor == 1:
        return source
    return FoldedEntry(file, "F32", shape, 0, 4 * shape[0] * shape[1], source, factor)
