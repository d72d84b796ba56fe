"""Finds and parses the plan text of an engine file.

TensorRT-RTX writes one program for each optimization profile into an engine, as text among binary
data::

    header { inputs={ "input_ids.1" ... } outputs={ ... }
             region = { name=devmem size=8192000 ... } accelerators={sm89 } }
    descriptors { tensor={ dims={ 32 4096 } name="linear.1" type=bf16 ... }
                  sub_tensor={ base="linear.1" name="__mye1^deref" ... } }
    main { function={ name=_gemm_mha_v2 input_args={ ... } output_args={ ... } ... }
           fully_connected={ input={...} output={...} } }
    shape_main { mul={ output={"__mye2" } input={"__mye3" "__s^32i64" } } ... }

``accelerators={*}`` marks the program inside a fused kernel; these are left out. The format is
nobody's promise. What is not as expected raises :class:`PlanUnreadable`.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_HEADER = b"header {\n  version = "
_SECTIONS = ("header", "descriptors", "main", "shape_main")
_SECTION_END = "\n}\n"
_MOST_BYTES = 256 << 20
"""A program longer than this is none."""
_LIST = r'\{(?:[^{}"]|"[^"]*")*\}'
_STATEMENT = re.compile(r"^  (\w+) ?= ?\{(.*)\}\s*$", re.M)
_FIELD = re.compile(rf'(\w+) ?= ?({_LIST}|"[^"]*"|[^\s{{}}"]+)')
_LIST_FIELD = re.compile(rf"^  (\w+) ?= ?({_LIST})\s*$", re.M)
_WORD = re.compile(r'"([^"]*)"|([^\s{}"]+)')
_NOT_KERNELS = frozenset({"signal", "wait", "shape_call", "assert", "label"})
_PROFILE = re.compile(r" \[profile (\d+)\]")


class PlanUnreadable(Exception):  # noqa: N818  (it says what was found, as a word of the report)
    """Says how a plan text differs from what this reader knows."""


@dataclass(frozen=True)
class Tensor:
    """Describes a tensor of a program.

    Attributes:
        dims: Sizes; a name where a size depends on the batch or the rows.
        dtype: Type in the library's words, as ``bf16``.
        base: The tensor whose memory this one views; None = its own.
        order: Axes from the outermost stride to the innermost.
        is_constant: Whether its data lies in the engine.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str
    base: str | None = None
    order: tuple[str, ...] = ()
    is_constant: bool = False


@dataclass(frozen=True)
class Operation:
    """Describes a kernel or a step that computes shapes.

    ``fields`` has what else its line says.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fields: dict[str, str] = field(compare=False)


@dataclass(frozen=True)
class Program:
    """Holds what runs under one optimization profile.

    Attributes:
        inputs: Inputs of the engine; a tensor that is an output too is updated in place.
        scratch_bytes: Memory for temporaries.
        kernels: Kernels in the order of their launch.
        shape_steps: Steps that compute the sizes that ``tensors`` have names for.
    """

    profile: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Tensor]
    kernels: tuple[Operation, ...]
    shape_steps: tuple[Operation, ...]
    scratch_bytes: int


def read_programs(path: Path) -> tuple[Program, ...]:
    """The programs of an engine file, in the order of their profiles.

    Raises:
        PlanUnreadable: there is none, or one is not written as this reader knows it.
    """
    programs = [parse_program(text) for text in _texts(path)]
    if not programs:
        raise PlanUnreadable("found no program in the engine")
    return tuple(sorted(programs, key=lambda program: program.profile))


def parse_program(text: str) -> Program:
    """One program; see the module's docstring.

    Raises:
        PlanUnreadable: it is not written as this reader knows it.
    """
    parts = _sections(text)
    lists = {name: _words(words) for name, words in _LIST_FIELD.findall(parts["header"])}
    if not lists.get("inputs") or not lists.get("outputs"):
        raise PlanUnreadable("found a program without inputs or outputs")
    tensors = {tensor.name: tensor for tensor in _tensors(parts["descriptors"])}
    return Program(
        profile=_profile(lists["inputs"]),
        inputs=lists["inputs"],
        outputs=lists["outputs"],
        tensors=tensors,
        kernels=tuple(one for one in _operations(parts["main"]) if one.kind not in _NOT_KERNELS),
        shape_steps=tuple(_operations(parts.get("shape_main", ""))),
        scratch_bytes=sum(_scratch(parts["header"])),
    )


def plain_name(name: str) -> str:
    """The tensor's name in the graph: ``x`` of ``x [profile 1].1``."""
    return _PROFILE.sub("", name).removesuffix(".1")


def _texts(path: Path) -> Iterator[str]:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = data.find(_HEADER)
        while begin >= 0:
            end = data.find(_HEADER, begin + 1)
            size = min((len(data) if end < 0 else end) - begin, _MOST_BYTES)
            text = data[begin : begin + size].decode("latin1")
            if "accelerators={*}" not in text.split(_SECTION_END, 1)[0]:
                yield text
            begin = end


def _sections(text: str) -> dict[str, str]:
    """Yield the parts between ``name {`` and a brace at the margin.

    They follow each other.
    """
    parts: dict[str, str] = {}
    position = 0
    for name in _SECTIONS:
        start = f"{name} {{\n"
        if not text.startswith(start, position):
            if name == "shape_main":
                break
            raise PlanUnreadable(f"found no section {name}")
        end = text.find(_SECTION_END, position)
        if end < 0:
            raise PlanUnreadable(f"found a section {name} without an end")
        parts[name] = text[position + len(start) - 1 : end + 1]
        position = end + len(_SECTION_END)
    return parts


def _tensors(text: str) -> Iterator[Tensor]:
    for kind, line in _STATEMENT.findall(text):
        if kind not in ("tensor", "sub_tensor"):
            raise PlanUnreadable(f"found a descriptor of kind {kind}")
        fields = dict(_FIELD.findall(line))
        if not {"dims", "name", "type"} <= fields.keys() or (kind == "sub_tensor") != (
            "base" in fields
        ):
            raise PlanUnreadable(f"found a {kind} with {', '.join(fields) or 'nothing'}")
        yield Tensor(
            name=_unquoted(fields["name"]),
            dims=tuple(int(word) if word.isdigit() else word for word in _words(fields["dims"])),
            dtype=fields["type"],
            base=_unquoted(fields["base"]) if "base" in fields else None,
            order=_words(fields.get("stride_order", "{}")),
            is_constant="const_payload_size" in fields,
        )


def _operations(text: str) -> Iterator[Operation]:
    for kind, line in _STATEMENT.findall(text):
        fields = dict(_FIELD.findall(line))
        inputs = fields.pop("input_args", None) or fields.pop("input", None) or "{}"
        outputs = fields.pop("output_args", None) or fields.pop("output", None) or "{}"
        if "name" not in fields and kind not in _NOT_KERNELS:
            raise PlanUnreadable(f"found a {kind} without a name")
        yield Operation(
            kind, _unquoted(fields.get("name", "")), _words(inputs), _words(outputs), fields
        )


def _scratch(header: str) -> Iterator[int]:
    for kind, line in _STATEMENT.findall(header):
        fields = dict(_FIELD.findall(line))
        if kind == "region" and fields.get("place") == "accelerator" and "constant" not in fields:
            if not fields.get("size", "").isdigit():
                raise PlanUnreadable("found a region of the GPU's memory without a size")
            yield int(fields["size"])


def _profile(names: tuple[str, ...]) -> int:
    found = {int(match[1]) for match in map(_PROFILE.search, names) if match}
    if len(found) > 1:
        raise PlanUnreadable(f"found one program with the inputs of profiles {sorted(found)}")
    return found.pop() if found else 0


def _words(words: str) -> tuple[str, ...]:
    return tuple(quoted or bare for quoted, bare in _WORD.findall(words))


def _unquoted(word: str) -> str:
    return word.removeprefix('"').removesuffix('"')
