"""Runs the command line in processes of their own that share the imports of libraries.

A command may take seconds to import PyTorch and ONNX. A server imports the libraries once, and
nothing of ours; each command is a fork of it. What a command may not import, or how it takes a
signal, is tested by a process that begins from nothing.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = (
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "rich.console",
    "rich.table",
    "safetensors.numpy",
    "tokenizers",
    "torch",
    "typer",
)
Done = subprocess.CompletedProcess[str]


def trimode(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
    """Run ``trimode`` with these arguments; ``env`` is added to this process's environment."""
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in arguments]
    return run_module("trimode.cli.main", *words, cwd=cwd, env=env)


def run_line(line: str, folder: Path) -> Done:
    """Run a line of a page, ``trimode`` or a shell's, in a folder."""
    words = shlex.split(line)
    if words[0] == "trimode":
        return trimode(*words[1:], cwd=folder)
    return subprocess.run(
        ["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False
    )


def run_module(
    module: str, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Done:
    """Run ``python -m MODULE`` with these words."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = _server().run(
            {
                "module": module,
                "words": words,
                "cwd": str(cwd or Path.cwd()),
                "env": {**os.environ, **(env or {})},
                "out": str(out),
                "err": str(err),
            }
        )
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess(["python", "-m", module, *words], code, *texts)


class _Server:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@functools.cache
def _server() -> _Server:
    return _Server()


def _serve() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)  # noqa: T201


def _become(request: dict[str, Any]) -> None:
    """Be the command's process: never returns."""
    code = 1
    try:
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv[1:] = request["words"]
        sys.path[0] = request["cwd"]  # as `python -m` has it
        code = _exit_code(request["module"])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _exit_code(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            sys.stderr.write(f"{exit_.code}\n")
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return 0


if __name__ == "__main__":
    _serve()
