"""Implements ``trimode report serve``."""

from __future__ import annotations

import sys

from trimode.cli.options import load as options
from trimode.cli.options.shared import Json


def report_serve(
    results: options.Results, *, output: options.Page = None, as_json: Json = False
) -> None:
    """Compare load tests in a table and a page."""
    from trimode.cli.load_output import show
    from trimode.cli.output import print_json
    from trimode.formats.files import check_file_place, replace_text
    from trimode.formats.load import read_result
    from trimode.report.load_page import load_page

    if output is not None:
        check_file_place(output)
    names = _names([str(place) for place in results])
    found = [(name, read_result(place)) for name, place in zip(names, results, strict=True)]
    if output is not None:
        replace_text(output, load_page(found))
        sys.stderr.write(f"wrote {output}\n")
    if as_json:
        print_json({name: result.model_dump(mode="json") for name, result in found}, indent=1)
    else:
        show(found)


def _names(places: list[str]) -> list[str]:
    """Return the last parts of paths, or numbered paths where parts repeat."""
    from pathlib import Path

    short = [Path(place).resolve().name for place in places]
    is_unique = len(set(short)) == len(short)
    return short if is_unique else [f"{number}: {place}" for number, place in enumerate(places, 1)]
