"""Errors of the library name parameters; those of a command name its flags."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import trimode

from trimode.calib.drafter.job import DrafterJob
from trimode.calib.drafter.settings import DrafterJobSettings
from trimode.calib.evaluate.quantization.job import measure
from trimode.calib.evaluate.quantization.questions import QualitySettings
from trimode.calib.evaluate.quantization.sensitivity import DropLimit
from trimode.calib.sampler.settings import SamplerJobSettings
from trimode.calib.scales.job import ScalesJob
from trimode.calib.scales.settings import QuantizeSettings
from trimode.cli.build import run_build
from trimode.cli.calibrate.sampler import sampler_command
from trimode.cli.calibrate.scales import run_calibrate
from trimode.cli.calibrate.training import run_training
from trimode.cli.flags import BUILD_FLAGS, FLAGS, VERIFY_FLAGS
from trimode.cli.main import app
from trimode.compiler.options import BuildOptions
from trimode.compiler.verify.run import verify
from trimode.errors import CheckpointError, TrimodeError, UsageError
from trimode.runtime.text.prompts import USUAL_STYLE, PromptStyle

ROOT = Path(__file__).parents[2]
CALIB = ROOT / "calib"
SPOKEN = re.compile(r"`([a-z_]+)`")


def texts(node: ast.AST) -> Iterator[str]:
    """The texts of an error, with what is put into them left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


def spoken_parameters() -> dict[str, str]:
    """Where the errors of calib name a parameter, by its name."""
    found: dict[str, str] = {}
    for path in sorted(CALIB.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                for text in texts(node):
                    found |= dict.fromkeys(SPOKEN.findall(text), f"{path.name}:{node.lineno}")
    return found


def test_every_parameter_in_an_error_has_a_flag() -> None:
    found = spoken_parameters()
    assert len(found) > 10
    assert {name: place for name, place in found.items() if name not in FLAGS} == {}


def test_no_error_of_the_library_names_a_flag() -> None:
    rooms = (CALIB, ROOT / "runtime")
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                # a command line that a hint gives whole has its flags
                words = re.sub(r"`trimode [^`]*`", "", "".join(texts(node)))
                assert not re.search(r"(?<!\S)--[a-z]", words), f"{path}:{node.lineno}"


def test_parameters_and_flags_exist() -> None:
    jobs = (DrafterJob.__init__, ScalesJob.__init__, measure)
    settings = (DrafterJobSettings, SamplerJobSettings, QuantizeSettings, QualitySettings)
    parameters = {
        name for one in (*jobs, *settings, DropLimit) for name in inspect.signature(one).parameters
    }
    assert set(FLAGS) - {"calibrations"} <= parameters  # the candidates of a report, by name
    commands: Any = typer.main.get_command(app)
    options = {
        option
        for group in ("calibrate", "report")
        for command in commands.commands[group].commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    assert set(FLAGS.values()) <= options


SPEAKING = ("compiler", "graphs", "src/trimode/formats")
FROM_OTHERS = ("compiler/passes", "compiler/tensorrt")


def errors_of_the_compiler() -> Iterator[tuple[str, str]]:
    """The texts of errors and hints, with their places."""
    root = CALIB.parent
    for folder in SPEAKING:
        for path in sorted((root / folder).rglob("*.py")):
            place = str(path.relative_to(root))
            if path.is_symlink() or place.startswith(FROM_OTHERS):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                    for text in texts(node):
                        yield f"{place}:{node.lineno}", text


def test_parameters_of_the_compiler_have_flags_and_no_error_names_a_flag() -> None:
    known = BUILD_FLAGS | VERIFY_FLAGS
    spoken = [
        (place, name) for place, text in errors_of_the_compiler() for name in SPOKEN.findall(text)
    ]
    assert len(spoken) > 20
    assert [(place, name) for place, name in spoken if name not in known] == []
    commands = re.compile(r"`(trimode|hf) [^`]*`")
    for place, text in errors_of_the_compiler():
        assert not re.search(r"(?<!\S)--[a-z]", commands.sub("", text)), place


@pytest.mark.parametrize(
    ("flags", "called", "command"),
    [(BUILD_FLAGS, BuildOptions, "build"), (VERIFY_FLAGS, verify, "verify")],
)
def test_parameters_and_flags_of_the_compiler_exist(
    flags: dict[str, str], called: Any, command: str
) -> None:
    # a target is chosen when the bundle is opened, before anything is compared
    assert set(flags) - {"target"} <= set(inspect.signature(called).parameters)
    group: Any = typer.main.get_command(app)
    assert set(flags.values()) <= {
        name for parameter in group.commands[command].params for name in parameter.opts
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(max_batch=0), "expected --max-batch from 1"),
        (BuildOptions(num_jobs=0), "expected --jobs of at least 1"),
        (BuildOptions(workspace_mib=0), "expected --workspace of at least 1"),
        (BuildOptions(targets=("auto",)), "--target auto: expected a GPU"),
        (BuildOptions(precision="int4"), "--precision int4: expected --calibration, found none"),
    ],
)
def test_a_build_names_its_flags(tmp_path: Path, options: BuildOptions, message: str) -> None:
    demo = CALIB.parent / "artifacts" / "nld-tiny"
    with pytest.raises(UsageError, match=message):
        run_build(demo, tmp_path / "bundle", options, as_json=False)


def test_renaming_keeps_the_rest() -> None:
    error = CheckpointError("`a`, `b` and a", "pass `a`, not `c d`")
    error.rename({"a": "--a", "c": "--c"})
    assert (error.message, error.hint) == ("--a, `b` and a", "pass --a, not `c d`")
    assert str(error) == "--a, `b` and a\nhint: pass --a, not `c d`"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "expected --heads of at least 1, found 0"),
        ({"num_held_out": 0}, "expected --held-out of at least 1, found 0"),
        ({"block_lengths": (1,)}, "expected --block-length from 2 to 64, found 1"),
        ({"d_model": 18, "num_heads": 2}, "expected --d-model that is a multiple"),
    ],
)
def test_a_training_names_its_flags(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = replace(SamplerJobSettings(), **changes)
    data = tmp_path / "data.jsonl"
    with pytest.raises(UsageError, match=message):
        run_training(
            sampler_command(), tmp_path, tmp_path / "out", data, settings, style=USUAL_STYLE
        )


@pytest.mark.parametrize(
    ("settings", "resume", "message"),
    [
        (QuantizeSettings("fp8", memory_gib=-1.0), False, "expected --memory of at least 0"),
        (
            QuantizeSettings("int4", is_per_channel=True),
            False,
            "expected --per-channel with --precision fp8, found int4",
        ),
        (QuantizeSettings("fp8"), True, "hint: leave out --resume to start over"),
    ],
)
def test_a_calibration_names_its_flags(
    tmp_path: Path, settings: QuantizeSettings, resume: bool, message: str
) -> None:
    with pytest.raises(TrimodeError, match=message):
        run_calibrate(
            tmp_path / "checkpoint",
            tmp_path / "out",
            tmp_path / "data.jsonl",
            settings,
            style=USUAL_STYLE,
            resume=resume,
        )


def test_a_command_names_flags_whoever_raised_the_error(demo: Path) -> None:
    """The library speaks of parameters; no command has to know which."""
    style = PromptStyle(is_raw=True, system="x")
    with pytest.raises(UsageError, match="expected `is_raw` without `system`, found both"):
        style.check()
    done = trimode("run", demo, "--prompt", "a", "--raw", "--system", "x")
    assert done.returncode == 2
    assert "expected --raw without --system, found both" in done.stderr
    assert "which --raw goes without" in done.stderr


def test_a_bad_line_names_flags_too(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    done = trimode("run", demo, "--prompts-file", file, "--raw", "--json")
    assert done.returncode == 2
    assert "`messages`, which is for the chat template" in done.stderr
    assert json.loads(done.stdout) == {
        "line": 1,
        "error": "expected a `prompt` alone with --raw, found `messages`",
    }
