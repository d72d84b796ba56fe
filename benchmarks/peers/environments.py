"""Sets up each peer in an environment of its own, once."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0", "onnx", "ml_dtypes", "numpy"),
    "openvino": ("openvino==2026.4.1", "numpy"),
    "llamacpp": ("gguf==0.19.0", "numpy", "diskcache", "jinja2", "typing_extensions"),
}
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its source has llama.cpp inside; there is no wheel, so it is compiled for this processor."""


def python_of(home: Path, peer: str) -> Path:
    """The interpreter that runs a peer."""
    return Path(sys.executable) if peer == "trimode" else home / peer / "bin" / "python"


def variables_of(home: Path, peer: str) -> dict[str, str]:
    """Environment variables of a peer's processes."""
    root = Path(__file__).parents[2]
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    if peer == "trimode":
        found["PYTHONPATH"] = os.pathsep.join((str(root / "src"), str(root)))
    else:
        found.pop("PYTHONPATH", None)
    if peer == "llamacpp":
        found["LLAMA_CPP_LIB_PATH"] = str(home / "build" / "bin")
    return found


def prepare(home: Path, peers: tuple[str, ...]) -> None:
    """Make what is not there yet; llama.cpp takes minutes."""
    home.mkdir(parents=True, exist_ok=True)
    for peer in peers:
        if peer == "trimode" or (home / peer / "ready").exists():
            continue
        _run(sys.executable, "-m", "venv", str(home / peer))
        pip = str(home / peer / "bin" / "pip")
        _run(pip, "install", "-q", *PACKAGES[peer])
        if peer == "genai":
            _borrow(home / peer, Path(sysconfig.get_path("purelib")))
        if peer == "llamacpp":
            _compile_llama_cpp(home, pip)
        (home / peer / "ready").touch()


def _compile_llama_cpp(home: Path, pip: str) -> None:
    sources = home / "src"
    source = ("--no-deps", "--no-binary", "llama-cpp-python", "-d", str(sources))
    _run(pip, "download", "-q", *source, LLAMA_CPP)
    (archive,) = sources.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as stream:
        stream.extractall(sources, filter="data")
    folder = sources / archive.name.removesuffix(".tar.gz")
    off = ("COMMON", "TOOLS", "EXAMPLES", "TESTS", "SERVER")
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=ON"]
    options += ["LLAMA_CURL=OFF", *(f"LLAMA_BUILD_{name}=OFF" for name in off)]
    places = ("-S", str(folder / "vendor" / "llama.cpp"), "-B", str(home / "build"))
    _run("cmake", *places, "-G", "Ninja", *(f"-D{option}" for option in options))
    _run("ninja", "-C", str(home / "build"), "llama")
    _borrow(home / "llamacpp", folder)


def _borrow(environment: Path, folder: Path) -> None:
    """Let an environment import from a folder too, behind its own packages."""
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "zz_borrowed.pth").write_text(f"{folder}\n")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
