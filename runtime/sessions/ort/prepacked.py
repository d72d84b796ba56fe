"""Keeps weights that ONNX Runtime has prepacked for this processor.

They lie in one file that all graphs map.

Kernels for int4 are only fast over weights in an arrangement of their own, which depends on the
processor and on the version of ONNX Runtime. By default each session makes one for itself: so many
graphs, so many copies. A session can also write its optimized graph with the prepacked weights
beside it (https://github.com/microsoft/onnxruntime/pull/23069), and a session over such a graph
maps them. Each graph gets a file of its own that way; here the files become one in which equal
tensors lie once, and the graphs are made to point there.

An entry of the cache is a folder: the graphs, ``weights.bin`` and ``contents.json`` with their
digests. Its name is the digest of all that it depends on, so that it is right or absent, never
stale; it appears by renaming, and is made again where a digest differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimode.formats.contract import GraphName
from trimode.formats.disk import what_is_wrong
from trimode.formats.files import sha256_of
from trimode.formats.texts import Unreadable, read_json
from trimode.runtime.bundle.cache_folder import PREPACKED, default_folder
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.sessions.ort.library import load_graph, ort
from trimode.runtime.sessions.ort.onnx_file import change_external_data

_VERSION = 1
"""Version of what an entry holds."""
_WEIGHTS, _CONTENTS = "weights.bin", "contents.json"
_ALIGNMENT = 4096
_MIN_EXTERNAL_BYTES = 1024
"""Smaller tensors stay in the graphs."""
_UNUSED_SECONDS = 90 * 86400
"""Entries that nothing has opened for so long are deleted when another is made."""

logger = logging.getLogger("trimode.runtime")


def prepacked_graphs(
    bundle: Bundle,
    graphs: Mapping[GraphName, str],
    make_options: Callable[[], Any],
    cache: Path | None,
) -> dict[GraphName, Path]:
    """Return the bundle's graphs over one file of prepacked weights.

    They are made where the cache does not have them.

    Args:
        bundle: Opened bundle.
        graphs: File of each graph in it.
        make_options: Function that makes the session options that the graphs are optimized with.
        cache: Folder of the cache; None = the user's.

    Raises:
        OSError: the cache cannot be read or written; a disk that is full is named.
        BundleError: ONNX Runtime refuses a graph.
    """
    folder = (cache or default_folder()) / PREPACKED
    entry = folder / _key(bundle, graphs)
    try:
        _have(entry, bundle, graphs, make_options)
    except OSError as error:
        raise OSError(error.errno, f"{folder}: {what_is_wrong(error, folder)}") from error
    # only of use to pruning, and the folder may be somebody else's
    with contextlib.suppress(OSError):
        os.utime(entry)
    return {graph_name: entry / f"{graph_name}.onnx" for graph_name in graphs}


def _have(
    entry: Path, bundle: Bundle, graphs: Mapping[GraphName, str], make_options: Callable[[], Any]
) -> None:
    """Make the entry where it is not whole."""
    if _is_whole(entry, graphs, bundle.is_verified):
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_name(f"{entry.name}.lock")):
        # another process may have made it meanwhile
        if not _is_whole(entry, graphs, bundle.is_verified):
            _make(
                entry,
                {graph_name: bundle.path / file for graph_name, file in graphs.items()},
                make_options,
            )
            _prune(entry.parent)


def _key(bundle: Bundle, graphs: Mapping[GraphName, str]) -> str:
    """Digest of everything an entry depends on."""
    manifest = bundle.manifest
    facts = {
        "version": _VERSION,
        "weights": [manifest.files[pack].sha256 for pack in bundle.chosen.packs],
        "graphs": {graph_name: manifest.files[file].sha256 for graph_name, file in graphs.items()},
        "onnxruntime": [ort.__version__, ort.get_build_info()],
        "processor": _processor(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _processor() -> list[str]:
    """What tells kinds of processors apart: name, model and instructions."""
    names = (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "flags",
        "Features",
        "CPU implementer",
        "CPU architecture",
        "CPU variant",
        "CPU part",
    )
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    return [
        platform.machine(),
        platform.processor(),
        *(line for line in lines if line.partition(":")[0].strip() in names),
    ]


def _is_whole(entry: Path, graph_names: Iterable[GraphName], is_verified: bool) -> bool:
    """Tell whether the entry is there as it was written down.

    The sizes of its files count, and if asked for their digests.
    """
    try:
        contents = read_json(entry / _CONTENTS)
        return contents.keys() >= {
            _WEIGHTS,
            *(f"{graph_name}.onnx" for graph_name in graph_names),
        } and all(
            (entry / name).stat().st_size == size
            and (not is_verified or sha256_of(entry / name) == digest)
            for name, (size, digest) in contents.items()
        )
    except (
        Unreadable,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        ValueError,
        TypeError,
        AttributeError,
    ):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, which one process has at a time.

    It is never deleted, because a deleted lock can be held twice.
    """
    import fcntl  # where there is none, other bundles should run nevertheless

    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(entry: Path, graphs: Mapping[GraphName, Path], make_options: Callable[[], Any]) -> None:
    logger.info("arranging the weights for this processor, once: %s", entry)
    # of a process that was killed: nobody else has the lock
    for leftover in entry.parent.glob(f"{entry.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staged = entry.with_name(f"{entry.name}.partial-{os.getpid()}")
    staged.mkdir()
    try:
        with (staged / _WEIGHTS).open("wb") as stream:
            weights = _SharedWeights(stream)
            for graph_name, graph in graphs.items():
                optimized = _optimize(graph, staged / f"{graph_name}.onnx", make_options())
                optimized.write_bytes(weights.take_over(optimized))
        files = sorted(staged.iterdir())
        contents = {path.name: (path.stat().st_size, sha256_of(path)) for path in files}
        (staged / _CONTENTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        # damaged: processes that have it open keep what they have
        shutil.rmtree(entry, ignore_errors=True)
        if entry.is_file():
            entry.unlink()
        staged.rename(entry)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _optimize(graph: Path, output: Path, options: Any) -> Path:
    """Let ONNX Runtime write the graph as it runs it here.

    Its weights lie beside it in ``<output>.bin``.
    """
    options.optimized_model_filepath = str(output)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{output.name}.bin"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES)
    )
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    load_graph(graph, options, ["CPUExecutionProvider"])
    return output


class _SharedWeights:
    """A file that grows by what it does not hold yet."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._offsets: dict[bytes, int] = {}

    def take_over(self, graph: Path) -> bytes:
        """Move the tensors beside a graph into this file.

        Returns:
            Graph over this file, serialized.
        """
        source = graph.with_name(f"{graph.name}.bin")
        with (
            source.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            changed = change_external_data(
                graph.read_bytes(), lambda entries: self._move(entries, view)
            )
        source.unlink()
        return changed

    def _move(self, entries: dict[str, str], source: memoryview) -> dict[str, str]:
        """Move an initializer's data into this file; return its new entries.

        ONNX Runtime writes prepacked weights as ``key|offset;length;checksum|...``, under names
        that begin with ``prepacked``.
        """
        if not {"location", "offset", "length"} <= entries.keys():
            raise OSError(
                f"ONNX Runtime {ort.__version__} describes a stored tensor in a way "
                f"that is not known here ({', '.join(entries)})"
            )
        moved = {
            "location": _WEIGHTS,
            "offset": self._place(source, entries["offset"], entries["length"]),
            "length": entries["length"],
        }
        for name, value in entries.items():
            if name.startswith("prepacked"):
                key, *pieces = value.split("|")
                fields = [piece.split(";") for piece in pieces]
                moved[name] = "|".join(
                    [
                        key,
                        *(
                            f"{self._place(source, offset, length)};{length};{check}"
                            for offset, length, check in fields
                        ),
                    ]
                )
            elif name not in ("location", "offset", "length"):
                raise OSError(
                    f"ONNX Runtime {ort.__version__} describes a stored tensor in a way "
                    f"that is not known here ({name})"
                )
        return moved

    def _place(self, source: memoryview, offset: str, length: str) -> str:
        """Place a piece of the source in this file, once.

        Returns its offset, as ONNX writes it.
        """
        piece = source[int(offset) : int(offset) + int(length)]
        if len(piece) != int(length):
            raise OSError(
                f"expected {length} bytes at {offset} in what ONNX Runtime wrote, "
                f"found {len(piece)}"
            )
        digest = hashlib.sha256(piece).digest()
        if digest not in self._offsets:
            self._stream.write(bytes(-self._stream.tell() % _ALIGNMENT))
            self._offsets[digest] = self._stream.tell()
            self._stream.write(piece)
        return str(self._offsets[digest])


def _prune(folder: Path) -> None:
    """Delete the entries that have not been opened for long.

    A process that has one open keeps what it has mapped.
    """
    for entry in folder.glob("*"):
        with contextlib.suppress(OSError):
            if (
                len(entry.name) == hashlib.sha256().digest_size * 2
                and time.time() - entry.stat().st_mtime > _UNUSED_SECONDS
            ):
                shutil.rmtree(entry, ignore_errors=True)
