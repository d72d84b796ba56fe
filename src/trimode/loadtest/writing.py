"""Writes the folder of a load test."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import trimode
from trimode.formats.files import check_replaceable, staged_replacement
from trimode.formats.load import PAGE, REQUESTS, RESULT, LoadResult, RequestRecord
from trimode.formats.versions import versions
from trimode.loadtest.job import Measured
from trimode.loadtest.plan import LoadTest, workload
from trimode.report.load_page import load_page

_WHAT = "a load test"


def check_output(folder: Path) -> None:
    """Check before the work that the folder can be written.

    Raises:
        UsageError: it holds something else.
        BuildError: nothing can be written there.
    """
    check_replaceable(folder, RESULT, _WHAT)


def load_result(test: LoadTest, measured: Measured, command: str) -> LoadResult:
    """Return the contents of ``result.json``.

    Args:
        test: Load test that was asked for.
        measured: Findings; the server has answered.
        command: Command line, for the record.
    """
    assert measured.server is not None
    assert measured.questions is not None
    return LoadResult(
        trimode_version=trimode.__version__,
        commit=_commit(),
        command=command,
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        machine=_machine(),
        partial=measured.is_partial,
        server=measured.server,
        workload=workload(test, measured.questions),
        runs=tuple(measured.runs),
        check=measured.check,
    )


def write_load_test(folder: Path, result: LoadResult, requests: Iterable[RequestRecord]) -> None:
    """Write the three files of a load test, replacing an earlier one.

    Raises:
        UsageError: the folder holds something else.
        BuildError: a file cannot be written.
    """
    check_replaceable(folder, RESULT, _WHAT)
    with staged_replacement(folder, RESULT) as staged:
        with (staged / REQUESTS).open("w", encoding="utf-8") as stream:
            stream.writelines(one.model_dump_json() + "\n" for one in requests)
        (staged / PAGE).write_text(load_page([(folder.resolve().name, result)]), encoding="utf-8")
        text = result.model_dump_json(indent=1)
        (staged / RESULT).write_text(text + "\n", encoding="utf-8")


def _machine() -> dict[str, str | int]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        **versions(("python", "httpx")),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    """Return the commit of the package's source tree; None without one."""
    git, here = shutil.which("git"), Path(trimode.__file__).resolve().parent
    if git is None or not (here.parents[1] / ".git").exists():
        return None
    command = [git, "-C", str(here), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
