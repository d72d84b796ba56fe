"""ModelOpt's part of a calibration: which quantizers a precision asks for, and one call. Nothing else imports ModelOpt."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from trimode.calib.quantize.settings import DEFAULT_BLOCK, SMALLEST_BLOCK, QuantizeSettings
from trimode.errors import BuildError, DependencyError, UsageError
from trimode.graphs.trunk import LowRankLinear, SelfAttention, TriModeTrunk

log = logging.getLogger(__name__)

HEAD = "diffusion_head"
ALGORITHMS: dict[str, Any] = {
    "fp8": "max",
    "int8": {"method": "smoothquant", "alpha": 1.0},  # inputs have one scale and weights one a row, so the weights can bear more
    "int4": {"method": "awq_lite", "alpha_step": 0.1},
}
_E4M3 = (4, 3)


class BranchOutside(nn.Module):
    """A :class:`LowRankLinear` whose product with the weight is a plain ``nn.Linear``, ``base``.

    ModelOpt would either leave the layer alone, since it overrides ``forward``, or quantize the input of its branch too. The graphs
    quantize the base product and nothing of the branch, so ``base`` alone gets quantizers.
    """

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        self.base.weight = layer.weight
        self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling

    def forward(self, x: Tensor, drafter_scale: Tensor | float | None = None) -> Tensor:
        """See :class:`LowRankLinear`."""
        y = self.base(x)
        if drafter_scale is None or self.lora_A is None or self.lora_B is None:
            return y  # type: ignore[no-any-return]
        return y + self.lora_B(self.lora_A(x) * (drafter_scale * self.scaling))  # type: ignore[no-any-return]


def load_modelopt() -> ModuleType:
    """``modelopt.torch.quantization``; takes seconds the first time.

    Raises:
        DependencyError: it is not installed, or something that it imports is not.
    """
    with tamed():
        try:
            return importlib.import_module("modelopt.torch.quantization")
        except ImportError as error:
            missing = error.name or "nvidia-modelopt"
            raise DependencyError(f"expected nvidia-modelopt for calibration, found that {missing} is not installed",
                                  "pip install 'trimode[calib]'") from error  # fmt: skip


def split_branches(trunk: TriModeTrunk) -> None:
    """Replace each :class:`LowRankLinear` of the trunk by a :class:`BranchOutside` over the same weights."""
    for module in list(trunk.modules()):
        if isinstance(module, SelfAttention):
            module.o_proj = BranchOutside(module.o_proj)  # type: ignore[assignment]


def quantized_linears(trunk: TriModeTrunk, settings: QuantizeSettings) -> dict[str, nn.Linear]:
    """The layers to quantize, by the checkpoint's names; branches have to be split.

    int4 leaves out layers whose inputs the block size does not divide: they stay in high precision.

    Raises:
        UsageError: none is left.
    """
    linears = {
        name.removesuffix(".base"): module
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and (name != HEAD or settings.quantizes_head)
    }
    if settings.precision != "int4":
        return linears
    block = block_size_of(linears, settings)
    for name in [name for name, linear in linears.items() if linear.in_features % block]:
        log.warning("%s stays in high precision: blocks of %d do not divide its %d inputs", name, block, linears[name].in_features)
        del linears[name]
    if not linears:
        raise UsageError(f"expected layers whose inputs come in blocks of {block}, found none", "choose another --precision for this checkpoint")
    return linears


def block_size_of(linears: dict[str, nn.Linear], settings: QuantizeSettings) -> int:
    """The largest power of two up to the one asked for that divides the inputs of every layer that 16 divides."""
    block = settings.block_size or DEFAULT_BLOCK
    widths = {linear.in_features for linear in linears.values() if linear.in_features % SMALLEST_BLOCK == 0}
    while block > SMALLEST_BLOCK and any(width % block for width in widths):
        block //= 2
    return block


def run_modelopt(
    trunk: TriModeTrunk, linears: dict[str, nn.Linear], settings: QuantizeSettings, forward_loop: Callable[[TriModeTrunk], None]
) -> None:
    """Let ModelOpt replace the linear layers of the trunk by quantized ones and calibrate them.

    Args:
        trunk: changed in place; SmoothQuant and AWQ also divide the weights by ``pre_quant_scale``.
        linears: see :func:`quantized_linears`; ModelOpt changes the class of these objects, which stay the same objects.
        settings: the precision and its granularity.
        forward_loop: runs all data through the trunk; AWQ calls it twice.

    Raises:
        BuildError: ModelOpt gives up.
    """
    quantization = load_modelopt()
    paths = {module: path for path, module in trunk.named_modules()}
    config = {"quant_cfg": quantizer_entries([paths[linear] for linear in linears.values()], block_size_of(linears, settings), settings),
              "algorithm": ALGORITHMS[settings.precision]}  # fmt: skip
    try:
        with tamed():
            quantization.quantize(trunk, config, forward_loop)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BuildError(f"expected ModelOpt to calibrate {len(linears)} layers, found that it gave up: {reason}",
                         "use another --precision, or other prompts") from error  # fmt: skip


def quantizer_entries(paths: list[str], block_size: int, settings: QuantizeSettings) -> list[dict[str, Any]]:
    """ModelOpt's ``quant_cfg``: FP8_DEFAULT_CFG, INT8_SMOOTHQUANT_CFG or INT4_AWQ_CFG, for the modules at these paths alone."""
    weight, data = {
        "fp8": ({"num_bits": _E4M3, "axis": 0 if settings.is_per_channel else None}, {"num_bits": _E4M3, "axis": None}),
        "int8": ({"num_bits": 8, "axis": 0, "narrow_range": True}, {"num_bits": 8, "axis": None, "narrow_range": True}),
        "int4": ({"num_bits": 4, "block_sizes": {-1: block_size, "type": "static"}}, None),
    }[settings.precision]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path in paths:
        entries.append({"quantizer_name": f"{path}.weight_quantizer", "cfg": weight})
        if data is not None:
            entries.append({"quantizer_name": f"{path}.input_quantizer", "cfg": data})
    return entries


@contextlib.contextmanager
def tamed() -> Iterator[None]:
    """What ModelOpt prints goes to the log, and its warnings, about software that is not used here, nowhere."""
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.info("modelopt: %s", line)
