"""Computes the sizes of a plan's tensors.

A plan has names for sizes that depend on the batch and the rows, and steps that compute them.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable

from trimode.compiler.plans.text import Operation, PlanUnreadable, Program, Tensor

BITS = {
    "int64": 64,
    "int32": 32,
    "float": 32,
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "half": 16,
    "int8": 8,
    "uint8": 8,
    "bool": 8,
    "fp8_e4m3": 8,
    "int4": 4,
    "fp4_e2m1": 4,
}
INTEGERS = ("int64", "int32", "bool")

_CONSTANT = re.compile(r'"?(-?\d+)i(?:64|32)"?')
_STEPS: dict[str, Callable[..., int]] = {
    "copy": lambda a: a,
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "div": lambda a, b: int(a / b),
    "min": min,
    "max": max,
    "eq": operator.eq,
    "neq": operator.ne,
    "gt": operator.gt,
    "lt": operator.lt,
    "geq": operator.ge,
    "leq": operator.le,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "select": lambda c, a, b: a if c else b,
}


class Sizes:
    """Computes bytes and element counts of a program's tensors.

    Args:
        program: Program of one profile.
        batch: Number of sequences of the forward.
        rows: Number of rows of each.
    """

    def __init__(self, program: Program, batch: int, rows: int) -> None:
        self._tensors = program.tensors
        self._values = _evaluate(program, batch, rows)

    def is_size(self, name: str) -> bool:
        """Tell whether a kernel's argument is a size, not a tensor.

        A tensor is in the GPU's memory.
        """
        return name in self._values

    def find(self, name: str) -> Tensor:
        """The tensor of this name; :class:`PlanUnreadable` where there is none."""
        if name not in self._tensors:
            raise PlanUnreadable(f"found no tensor {name}")
        return self._tensors[name]

    def elements(self, tensor: Tensor) -> int:
        """How many numbers it has."""
        return math.prod(self._size(tensor, one) for one in tensor.dims)

    def num_bytes(self, tensor: Tensor) -> int:
        """How many bytes it takes."""
        if tensor.dtype not in BITS:
            raise PlanUnreadable(f"found the type {tensor.dtype} of {tensor.name}")
        return -(-self.elements(tensor) * BITS[tensor.dtype] // 8)

    def _size(self, tensor: Tensor, size: int | str) -> int:
        if isinstance(size, int):
            return size
        if size not in self._values:
            raise PlanUnreadable(f"found no step that computes the size {size} of {tensor.name}")
        return self._values[size]


def _evaluate(program: Program, batch: int, rows: int) -> dict[str, int]:
    """Run the steps; what cannot be computed has no value."""
    values = _seeds(program, batch, rows)
    for step in program.shape_steps:
        found = _result(step, values)
        if found is not None and len(step.outputs) == 1:
            values.setdefault(step.outputs[0], found)
    return values


def _seeds(program: Program, batch: int, rows: int) -> dict[str, int]:
    """Give the sizes of inputs.

    Dimension 0 of an input is the batch, any other that is not fixed is the rows. Both come by way
    of a copy from a step's result.
    """
    sources = {
        step.outputs[0]: step.inputs[0]
        for step in program.shape_steps
        if step.kind == "copy" and step.inputs and step.outputs
    }
    values: dict[str, int] = {}
    for name in program.inputs:
        for axis, size in enumerate(program.tensors[name].dims if name in program.tensors else ()):
            if isinstance(size, str):
                values[size] = values[sources.get(size, size)] = rows if axis else batch
    return values


def _result(step: Operation, values: dict[str, int]) -> int | None:
    if step.kind == "memset":
        match = _CONSTANT.fullmatch(step.fields.get("src", ""))
        return int(match[1]) if match else None
    given = [values.get(name) for name in step.inputs]
    if step.kind not in _STEPS or not given or any(value is None for value in given):
        return None
    try:
        return int(_STEPS[step.kind](*given))
    except (TypeError, ZeroDivisionError):
        return None
