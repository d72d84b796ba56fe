"""The documentation is true: links lead somewhere, commands run, pictures show the code."""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run_line

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    ROOT / "artifacts" / "README.md",
]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:", target):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            if anchor:
                assert anchor in set(_anchors(linked.read_text(encoding="utf-8"))), target


def _anchors(text: str) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", GUIDES, ids=names(GUIDES))
def test_commands_of_a_guide_run(page: Path, tmp_path: Path) -> None:
    """And a quickstart prints what it shows."""
    text, printed = page.read_text(encoding="utf-8"), ""
    (tmp_path / "artifacts").symlink_to(ROOT / "artifacts")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith(("trimode ", "echo ")):
                done = run_line(line, tmp_path)
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                printed += done.stdout + done.stderr
    if page.name == "quickstart.md":
        _assert_shown_is_printed(text, printed)
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "from trimode" in snippet:
            subprocess.run([sys.executable, "-W", "error", "-c", snippet], cwd=tmp_path, check=True)


def _assert_shown_is_printed(text: str, printed: str) -> None:
    """Text and counts; speeds differ from machine to machine."""
    printed = re.sub(r"\d+ tokens/s", "", printed)
    for shown in re.findall(r"```text\n(.*?)```", text, re.DOTALL):
        for line in shown.splitlines():
            assert re.sub(r"\d+ tokens/s", "", line) in printed, line


def test_the_architecture_picture_shows_the_layers() -> None:
    """Every room is in it, an arrow leads to a lower layer, and is an import of the code."""
    rank = {
        room.strip(" ()"): -place  # in brackets is what need not be there
        for place, layer in enumerate(_layers())
        for room in re.split(r"[|:]", layer)
        if "(" not in room or (ROOT / "src" / "trimode" / room.strip(" ()")).is_dir()
    }
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"flowchart BT\n(.*?)```", page, re.DOTALL)
    assert picture is not None
    arrows = re.findall(r"(\w+) --> (\w+)", picture[1])
    assert {room for arrow in arrows for room in arrow} == set(rank)
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(rank)
    for above, below in arrows:
        assert rank[above] > rank[below]
        assert below in _imported_by(above), f"{above} imports nothing from {below}"


def _layers() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["type"] == "layers")
    return list(contract["layers"])


def _imported_by(room: str) -> set[str]:
    sources = (ROOT / "src" / "trimode" / room).rglob("*.py")
    found = (re.findall(r"^ *from trimode\.(\w+)", s.read_text(), re.MULTILINE) for s in sources)
    return {name for names_ in found for name in names_}


def test_the_reference_of_the_command_line_is_that_of_the_app(tmp_path: Path) -> None:
    """CONTRIBUTING.md has the command that writes it."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"^python (-m typer .*) --output (docs/\S+)", contributing, re.MULTILINE)
    assert found is not None
    output = tmp_path / "cli.md"
    command = [sys.executable, *shlex.split(found[1]), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    committed = (ROOT / found[2]).read_text(encoding="utf-8")
    assert output.read_text(encoding="utf-8") == committed


def test_the_path_through_the_code_exists() -> None:
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"^\d\. `([^`]+)`", page, re.MULTILINE)
    assert len(files) == 5
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_code_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "src|graphs|compiler|runtime|calib|tests|benchmarks"
    for file in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file
    for module in re.findall(r"python -m ((?:benchmarks|trimode)[\w.]+\w)", text):
        place = ROOT / "src" if module.startswith("trimode") else ROOT
        assert place.joinpath(*module.split(".")).with_suffix(".py").is_file(), module


def test_sentences_are_short() -> None:
    """Half have at most 14 words, nine in ten at most 25; tables and code are not prose."""
    lengths = [
        len(sentence.split())
        for page in (ROOT / "docs").rglob("*.md")
        if page.name != "cli.md"  # generated: hundreds of lines a few words long
        for sentence in _sentences(page)
    ]
    assert statistics.median(lengths) <= 14
    assert statistics.quantiles(lengths, n=10)[-1] <= 25


def _sentences(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^\|.*$|^#.*$|^:::.*$|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", text):
        for sentence in re.split(r"(?<=[.:!?])\s+", " ".join(paragraph.split())):
            if re.search(r"\w", sentence):
                yield sentence
