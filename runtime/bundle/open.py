"""Opens a bundle: reads the manifest and checks every file against it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trimode.errors import BundleError, UsageError
from trimode.formats.files import sha256_of
from trimode.formats.hints import BUILD, REBUILD
from trimode.formats.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    PrecisionName,
    PrecisionRecord,
)
from trimode.formats.manifest_checks import contradiction
from trimode.formats.record import OtherVersion, read_record
from trimode.formats.texts import Unreadable, reason_of
from trimode.runtime.bundle.shapes import check_shapes
from trimode.runtime.bundle.weights import PrecisionWeights

_UNREADABLE = f"check the file's permissions, or {REBUILD}"


@dataclass(frozen=True)
class Bundle:
    """Opens one precision of a bundle whose files match its manifest.

    Attributes:
        is_verified: Whether digests were compared, or sizes only.
    """

    path: Path
    manifest: Manifest
    precision: PrecisionName
    is_verified: bool = True

    @property
    def chosen(self) -> PrecisionRecord:
        """Facts of the manifest about the precision."""
        return self.manifest.precisions[self.precision]

    def weights(self) -> PrecisionWeights:
        """Tensors of the precision.

        Raises:
            BundleError: a pack cannot be read.
        """
        return PrecisionWeights([self.path / name for name in self.chosen.packs])


def open_bundle(path: str | Path, precision: str | None = None, *, verify: bool = True) -> Bundle:
    """Open a bundle folder.

    Args:
        path: Folder of the bundle.
        precision: Precision to open; None = the one that was built first.
        verify: Whether to compare the sha256 of every file that the precision reads. Each byte is
            read once, through the page cache that the sessions map afterwards. Otherwise sizes are
            compared, as for files of other precisions.

    Raises:
        BundleError: not a bundle, another schema, or a file that is missing or was changed.
        UsageError: the bundle has no such precision.
    """
    path = Path(path)
    manifest = read_manifest(path)
    chosen = choose_precision(manifest, precision)
    for name, record in manifest.files.items():
        _check_size(path / name, record)
    if verify:
        read = [
            item
            for item in manifest.files.items()
            if item[0] not in _files_of_others(manifest, chosen)
        ]
        # Hashing releases the interpreter lock; small files first keep a second thread busy beside
        # the weights.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: _check_digest(path / item[0], item[1]), read))
    bundle = Bundle(path, manifest, chosen, verify)
    check_shapes(bundle.weights().entries, manifest.model)
    return bundle


def choose_precision(manifest: Manifest, name: str | None) -> PrecisionName:
    """Choose one of the bundle's precisions; None is the first.

    Raises:
        UsageError: the bundle has no such precision.
    """
    if name is None:
        return manifest.first_precision
    for precision in manifest.precisions:
        if precision == name:
            return precision
    raise UsageError(
        f"expected a precision of the bundle ({', '.join(manifest.precisions)}), found {name!r}",
        "choose one of these, or add one: "
        "`trimode build CHECKPOINT -o BUNDLE --precision PRECISION`",
    )


def files_of(record: PrecisionRecord) -> set[str]:
    """List the files that a precision reads."""
    return {
        *record.packs,
        *record.graphs.values(),
        *(engine.file for target in record.targets.values() for engine in target.engines),
    }


def _files_of_others(manifest: Manifest, chosen: PrecisionName) -> set[str]:
    others = (files_of(record) for name, record in manifest.precisions.items() if name != chosen)
    return set().union(*others) - files_of(manifest.precisions[chosen])


def read_manifest(path: Path) -> Manifest:
    """Read ``manifest.json`` of a bundle without looking at the other files.

    Raises:
        BundleError: there is none, it cannot be read, is of another schema, or contradicts itself.
    """
    file = path / MANIFEST
    try:
        manifest = read_record(file, Manifest, (SCHEMA_VERSION,))
    except OtherVersion as error:
        hint = f"update trimode, or {REBUILD}" if error.found > SCHEMA_VERSION else REBUILD
        raise BundleError(f"{file}: {error.reason}", hint) from error
    except Unreadable as error:
        if error.is_missing:
            hint = f"build one with {BUILD}"
            raise BundleError(
                f"{path}: expected a bundle with {MANIFEST}, found none", hint
            ) from error
        raise BundleError(
            f"{file}: expected a valid manifest, found one that cannot be read ({error.reason})",
            _UNREADABLE,
        ) from error
    if wrong := contradiction(manifest):
        raise BundleError(f"{file}: {wrong}", REBUILD)
    return manifest


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{path}: expected a file of {record.num_bytes} bytes, found none", REBUILD
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != record.num_bytes:
        raise BundleError(f"{path}: expected {record.num_bytes} bytes, found {found}", REBUILD)


def _check_digest(path: Path, record: FileRecord) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != record.sha256:
        raise BundleError(
            f"{path}: expected sha256 {record.sha256[:16]}…, found {found[:16]}…: "
            "the file was changed after the build",
            REBUILD,
        )


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{path}: expected a file that can be read, found: {reason_of(error)}", _UNREADABLE
    )
