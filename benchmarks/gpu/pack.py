"""Packs what a GPU machine without a package index needs, in pieces of at most 45 MB that can be
carried one at a time.

python -m benchmarks.gpu.pack rtx -o .gpu-rtx        TensorRT-RTX 1.7 and trimode's other needs
python -m benchmarks.gpu.pack ort -o .gpu-ort        onnxruntime-gpu
python -m benchmarks.gpu.pack calib -o .gpu-calib    ModelOpt and what it imports beside PyTorch
python -m benchmarks.gpu.pack join FOLDER SITE       over there: unpacks FOLDER's pieces into SITE

SITE is for PYTHONPATH. Wheels are for Linux x86-64 and Python 3.12. They are unpacked and
compressed again as one archive (xz), which is a third smaller.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PIECE_BYTES = 45_000_000
GROUPS = {
    "rtx": (
        "tensorrt-rtx-cu13-libs==1.7.1.116",
        "tensorrt-rtx-cu13-bindings==1.7.1.116",
        "cuda-bindings",
        "cuda-pathfinder",
        "onnx-ir>=1.1",
        "polygraphy",
        "pydantic",
        "pydantic-core",
        "annotated-types",
        "typing-inspection",
        "typer>=0.29",
        "ml-dtypes>=0.5",
    ),
    "ort": ("onnxruntime-gpu>=1.31",),
    "calib": (
        "nvidia-modelopt>=0.47",
        "nvidia-ml-py",
        "omegaconf",
        "PyYAML",
        "pulp",
        "regex",
        "scipy",
        "tqdm",
        "requests",
        "rich",
    ),
}
TENSORRT_RTX_SHIM = (
    "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
)


def pack(group: str, folder: Path) -> None:
    """Download, unpack, compress and cut; ``index.json`` has the digest of each piece."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        site = Path(name) / "site"
        _unpack_wheels(GROUPS[group], Path(name) / "wheels", site)
        archive = Path(name) / "site.tar.xz"
        with tarfile.open(archive, "w:xz", preset=6) as tar:
            tar.add(site, ".")
        data = archive.read_bytes()
    digests = {}
    for number, begin in enumerate(range(0, len(data), PIECE_BYTES)):
        piece = folder / f"piece{number:02d}"
        piece.write_bytes(data[begin : begin + PIECE_BYTES])
        digests[piece.name] = hashlib.sha256(piece.read_bytes()).hexdigest()
    (folder / "index.json").write_text(
        json.dumps({"group": group, "num_bytes": len(data), "pieces": digests}, indent=1) + "\n"
    )
    print(f"{folder}: {len(digests)} pieces, {len(data) / 1e6:.1f} MB")


def join(folder: Path, site: Path) -> None:
    """Check the pieces, put them together and unpack them."""
    index = json.loads((folder / "index.json").read_text())
    with tempfile.TemporaryFile() as archive:
        for name, digest in index["pieces"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                sys.exit(
                    f"{folder / name}: expected sha256 {digest[:16]}, found another; carry it again"
                )
            archive.write(data)
        archive.seek(0)
        with tarfile.open(fileobj=archive, mode="r:xz") as tar:
            tar.extractall(site, filter="data")
    print(f"export PYTHONPATH={site}")


def _unpack_wheels(packages: tuple[str, ...], wheels: Path, site: Path) -> None:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)] + [
        "manylinux2014_x86_64"
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.12",
        "-d",
        str(wheels),
    ]
    command += [
        "--implementation",
        "cp",
        *(part for platform in platforms for part in ("--platform", platform)),
    ]
    for package in packages:
        subprocess.run([*command, package], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(site)
    if any(site.glob("tensorrt_rtx_bindings")):
        # The package of that name is published as source only; all it does is to name the bindings.
        (site / "tensorrt_rtx").mkdir(exist_ok=True)
        (site / "tensorrt_rtx" / "__init__.py").write_text(TENSORRT_RTX_SHIM)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for group in GROUPS:
        commands.add_parser(group).add_argument("-o", "--output", type=Path, required=True)
    joining = commands.add_parser("join")
    joining.add_argument("folder", type=Path)
    joining.add_argument("site", type=Path)
    options = parser.parse_args()
    if options.command == "join":
        join(options.folder, options.site)
    else:
        pack(options.command, options.output)


if __name__ == "__main__":
    main()
