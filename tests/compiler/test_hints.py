"""Hints name commands and options that exist, and commands that run as they stand."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import trimode

from trimode.cli.main import app
from trimode.formats import hints

ROOT = Path(__file__).parents[2]
PACKAGES = ("graphs", "compiler", "runtime", "calib")
ERRORS = {
    "TrimodeError",
    "UsageError",
    "CheckpointError",
    "BuildError",
    "BundleError",
    "DeviceError",
    "DependencyError",
}
QUOTED = re.compile(r"`trimode ([^`]*)`")
PLAIN = re.compile(r"(?<!`)\btrimode (\w+[^`;,]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FOREIGN = {"--local-dir", "--tree"}
"""Options of other programs."""
COMMANDS: Any = typer.main.get_command(app)


def texts_of(node: ast.AST) -> Iterator[str]:
    """The texts that an expression may come to, with X for what is put into them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            one.value if isinstance(one, ast.Constant) else named(one) for one in node.values
        )
    elif isinstance(node, ast.Name):
        yield named(node)
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts_of(child)


def named(node: ast.AST) -> str:
    """What stands for an expression: the hint of that name, or X."""
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    return getattr(hints, inner.id, "X") if isinstance(inner, ast.Name) else "X"


def hints_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and len(node.args) > 1
            and ast.unparse(node.func).rpartition(".")[2] in ERRORS
        ):
            yield from texts_of(node.args[1])
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).lower()
            if any(
                word in name
                for word in (
                    "hint",
                    "_force",
                    "_start_over",
                    "_default",
                    "_install",
                    "_make_again",
                    "_unreadable",
                    "command",
                )
            ):
                yield from texts_of(node.value)


def collect() -> list[tuple[str, str]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found += [
                (str(path.relative_to(ROOT)), text)
                for text in hints_of(ast.parse(path.read_text()))
            ]
    return found + [
        ("src/trimode/formats/hints.py", text)
        for name, text in vars(hints).items()
        if name.isupper()
    ]


HINTS = collect()


def options_of(command: Any) -> set[str]:
    return {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def leaves(command: Any) -> Iterator[Any]:
    for one in getattr(command, "commands", {}).values():
        yield from leaves(one)
    if not hasattr(command, "commands"):
        yield command


def find(words: list[str]) -> Any:
    """The command that words begin with; one of a group may go unnamed."""
    command = COMMANDS
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    unnamed = getattr(command, "unnamed", None)
    return command if unnamed is None else command.commands[unnamed]


def commands_in(text: str) -> list[str]:
    # the others are about the program
    plain = [line for line in PLAIN.findall(text) if line.split()[0] in COMMANDS.commands]
    return QUOTED.findall(text) + plain


def test_there_are_hints_to_check() -> None:
    assert len(HINTS) > 250
    assert sum(bool(commands_in(text)) for _, text in HINTS) >= 15


@pytest.mark.parametrize(("place", "text"), [pair for pair in HINTS if commands_in(pair[1])])
def test_commands_in_hints_exist_with_their_options(place: str, text: str) -> None:
    for line in commands_in(text):
        words = line.split()
        command = find(words)
        assert not hasattr(command, "commands"), f"{place}: {line}"
        given = {word for word in words if word.startswith("-")}
        assert given <= options_of(command), f"{place}: {line}"
        required = [
            set(one.opts)
            for one in command.params
            if one.required and one.param_type_name == "option"
        ]
        if len(words) > 2:  # more than a name in passing: all that is needed
            assert all(names & given for names in required), f"{place}: {line} lacks {required}"


@pytest.mark.parametrize(("place", "text"), [pair for pair in HINTS if OPTION.search(pair[1])])
def test_options_in_hints_exist(place: str, text: str) -> None:
    known = set().union(*map(options_of, leaves(COMMANDS)))
    assert set(OPTION.findall(text)) - FOREIGN <= known, f"{place}: {text}"


def test_extras_in_hints_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named_extras = {
        extra for _, text in HINTS for extra in re.findall(r"trimode\[(\w+)\]", text)
    } - {"X"}
    assert named_extras
    assert named_extras <= set(extras)


def test_the_commands_of_hints_run(tmp_path: Path) -> None:
    """Each as it stands, with the words in capitals replaced."""
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "Add {n} and {n}."}}\n' for n in range(11, 23))
    )
    places = {
        "CHECKPOINT": ROOT / "artifacts" / "nld-tiny",
        "BUNDLE": tmp_path / "bundle",
        "FOLDER": tmp_path / "folder",
        "FILE": tmp_path / "t.json",
        "PROMPTS.jsonl": tmp_path / "prompts.jsonl",
        "NAME": "cpu",
        "PRECISION": "int8",
    }
    quick = {
        "calibrate": ["--max-new-tokens", "2"],
        "bench": ["--repeats", "1", "--rows", "1,4", "--past", "8"],
    }
    for hint in (
        hints.BUILD,
        hints.REBUILD,
        hints.REBUILD_TARGET,
        hints.ADD_TARGET,
        hints.CALIBRATE,
        hints.BENCH,
        "`trimode inspect BUNDLE`",
        "`trimode targets`",
    ):
        line = re.findall(r"`trimode ([^`]*)`", hint)[0]
        words = [str(places.get(word, word)) for word in shlex.split(line)]
        done = trimode(*words, *quick.get(words[0], []))
        assert done.returncode == 0, (line, done.stderr)


def test_a_damaged_bundle_is_mended_by_its_hint(tmp_path: Path) -> None:

    bundle, checkpoint = tmp_path / "bundle", ROOT / "artifacts" / "nld-tiny"
    ask = ("run", bundle, "--token-ids", "1,10", "--max-new-tokens", 1)
    assert trimode("build", checkpoint, "-o", bundle).returncode == 0
    data = bytearray((bundle / "ar.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "ar.onnx").write_bytes(data)
    damaged = trimode(*ask)
    assert damaged.returncode == 1
    command = re.search(r"`trimode (.*)`", damaged.stderr)
    assert command is not None
    words = [
        str({"CHECKPOINT": checkpoint, "BUNDLE": bundle}.get(word, word))
        for word in command[1].split()
    ]
    assert trimode(*words).returncode == 0
    assert trimode(*ask).returncode == 0
