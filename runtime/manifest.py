"""``manifest.json``: what a bundle holds. Written by the compiler, read by the runtime.

A bundle is a folder::

    manifest.json          this schema
    ar.onnx draft.onnx verify.onnx     graphs, no weights inside
    weights.safetensors    every tensor once; the graphs name it as ONNX external data
    tokenizer.json ...     copied from the checkpoint

Refused on opening: a newer schema, a file that is missing or whose size or sha256 differs, a file name that leaves the folder.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from trimode.graphs.contract import GraphContract, ModelInfo, Role

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


def _plain(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError(f"expected a relative file name inside the bundle, found {name!r}")
    return name


FileName = Annotated[str, AfterValidator(_plain)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """Digest (lower-case hex) and size of one file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class GraphRecord(_Record):
    """One graph: its file and its tensor contract."""

    file: FileName
    contract: GraphContract


class SourceRecord(_Record):
    """The checkpoint a bundle was built from.

    Attributes:
        name: the checkpoint folder's name.
        sha256: digest over name, type, shape and bytes of every tensor, and over ``config.json``.
    """

    name: str
    sha256: str
    num_parameters: int


class Manifest(_Record):
    """The contents of ``manifest.json``."""

    schema_version: int
    trimode_version: str
    precision: str
    targets: tuple[str, ...]
    model: ModelInfo
    source: SourceRecord
    graphs: dict[Role, GraphRecord]
    weights: FileName
    files: dict[FileName, FileRecord]
    libraries: dict[str, str]
