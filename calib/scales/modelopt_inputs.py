"""Runs ModelOpt on a layer's inputs, not on the model.

- ``max`` and SmoothQuant take the largest magnitude of each column. One row that has these gives
  the same as all rows.
- AWQ lite runs its data twice. First it takes the mean magnitude of each column over a forward's
  rows, averaged over forwards: one row again. Then it tries candidates, each of which costs the sum
  over forwards of the mean squared error of its products. This is run on the inputs of many
  forwards at once, since each candidate quantizes the weight anew in every call. A row of a forward
  of n rows is multiplied by ``sqrt(R / n)`` where R rows are run at once: the products are linear
  in the input, so that the mean over R rows is the sum of the forwards' own means.

The results are ModelOpt's on the whole model, which calibrates on inputs that no layer before has
quantized; the tests compare them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimode.calib.scales.layer_replay import linear_of
from trimode.calib.scales.modelopt import extract_scales, run_modelopt
from trimode.calib.scales.settings import QuantizeSettings
from trimode.calib.scales.statistics import InputStatistics
from trimode.formats.calibration import Scales

ROWS_AT_ONCE = 1024
Inputs = dict[str, Tensor]
"""Inputs of one forward, ``(rows, in)`` by layer."""


def find_scales(
    weights: Mapping[str, Tensor],
    statistics: InputStatistics,
    inputs: Callable[[], Iterable[Inputs]],
    block_size: int | None,
    settings: QuantizeSettings,
) -> Scales:
    """Let ModelOpt calibrate layers by themselves.

    Args:
        weights: Weights ``(out, in)`` in float32, by layer; SmoothQuant and AWQ leave them divided
            by ``pre_quant_scale``.
        statistics: Statistics of the layers' inputs.
        inputs: Function that runs all forwards again.
        block_size: Inputs that share a scale, for int4.
        settings: Precision and its granularity.

    Raises:
        BuildError: ModelOpt gives up, or finds a scale that is not a positive number.
    """
    linears = {name: linear_of(weight) for name, weight in weights.items()}
    passes = itertools.count()

    def forward_loop(_model: Any) -> None:
        if settings.precision != "int4":
            _feed_row(linears, statistics.largest)
        elif next(passes) == 0:
            _feed_row(linears, statistics.mean)
        else:
            _feed_rows(linears, inputs())

    run_modelopt(nn.ModuleList(linears.values()), linears, block_size, settings, forward_loop)
    return extract_scales(linears, settings.precision)


def _feed_row(linears: Mapping[str, nn.Module], row: Callable[[str], Tensor]) -> None:
    for name, linear in linears.items():
        linear(row(name)[None])


def _feed_rows(linears: Mapping[str, nn.Module], inputs: Iterable[Inputs]) -> None:
    for batch in batches(inputs):
        for name, linear in linears.items():
            linear(weighted_rows([forward[name] for forward in batch]))


def batches(inputs: Iterable[Inputs]) -> Iterator[list[Inputs]]:
    """Yield forwards in order, joined until they reach :data:`ROWS_AT_ONCE`."""
    batch: list[Inputs] = []
    rows = 0
    for forward in inputs:
        batch.append(forward)
        rows += max(x.shape[0] for x in forward.values())
        if rows >= ROWS_AT_ONCE:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch


def weighted_rows(forwards: Iterable[Tensor]) -> Tensor:
    """Join the rows of forwards, ``(n, in)``, so that forwards count alike.

    The mean square of products with them is the sum of the forwards' own.
    """
    some = [x for x in forwards if x.shape[0]]
    total = sum(x.shape[0] for x in some)
    return torch.cat([x * (total / x.shape[0]) ** 0.5 for x in some]) if some else torch.empty(0)
