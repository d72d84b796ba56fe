"""The command line over damaged files: whatever it reads, it ends well or in one line and a hint.

Each case damages one file in one way and runs one command in this process. Never allowed: a
traceback, an error that the boundary caught as a fault of ours, half an output, JSON on stdout that
is not whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from once import made_once

from trimode.cli.main import main
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
SAMPLER = Path(__file__).parents[2] / "artifacts" / "nld-tiny-sampler"
PROMPT = ("--prompt", "Add 1 and 2.", "--max-new-tokens", "2")

# Where a command can do without a file, or does not look at its contents, it may end well.
MAY_END_WELL = {
    "generation_config.json": {"missing", "empty object"},
    "tokenizer.json": {"missing"},
    "tokenizer_config.json": {"missing", "empty object"},
    "chat_template.jinja": {"missing", "empty file", "half", "a list"},
    "verification.json": {"missing"},
    "adapter_config.json": set(),
}


def _mkdir(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in random.Random(len(data)).sample(range(min(len(data), 4000)), min(len(data), 12)):
        data[place] ^= 0x55
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty file": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "binary": lambda path: path.write_bytes(random.Random(1).randbytes(3000)),
    "flipped": _flip,
    "a folder": _mkdir,
    "a dangling link": _dangle,
    "a list": lambda path: path.write_text("[]"),
    "a string": lambda path: path.write_text('"x"'),
    "a number": lambda path: path.write_text("3"),
    "null": lambda path: path.write_text("null"),
    "empty object": lambda path: path.write_text("{}"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "long number": lambda path: path.write_text('{"schema_version": ' + "9" * 5000 + "}"),
    "a pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n"
    ),
    "another encoding": lambda path: path.write_bytes('{"ü": 1}'.encode("utf-16")),
}

OF_JSON = {"a list", "a string", "a number", "null", "empty object", "deep", "long number"}


def damages(*names: str) -> list[tuple[str, str]]:
    """Each file with each damage; where no JSON is read, one of the JSON kinds stands for all."""
    return [
        (name, how)
        for name in names
        for how in DAMAGE
        if name.endswith(".json") or how == "a list" or how not in OF_JSON
    ]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["trimode", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def assert_clean(done: Done, *, may_end_well: bool, most_errors: int = 1) -> None:
    assert "Traceback" not in done.err
    assert "internal" not in done.err
    if done.code == 0:
        assert may_end_well, "expected a refusal"
        return
    assert done.code in (1, 2)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    hints = [line for line in done.err.splitlines() if line.startswith("hint: ")]
    assert 1 <= len(errors) == len(hints) <= most_errors, done.err
    assert max(map(len, errors)) < 1000
    for line in done.out.splitlines():
        json.loads(line)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def pristine(run_folder: Path) -> Path:
    """The bundle of the demo checkpoint and its sampler."""

    def make(folder: Path) -> None:
        build_bundle(DEMO, folder / "bundle", BuildOptions(sampler=SAMPLER))

    return made_once(run_folder / "demo_with_sampler", make) / "bundle"


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy whose weights are links to the same bytes, until they are damaged."""
    copy = tmp_path / "bundle"
    shutil.copytree(pristine, copy, copy_function=os.link)
    return copy


def damage(file: Path, how: str) -> None:
    # a copy of its own: the bytes may be shared
    if how not in ("missing", "a folder", "a dangling link"):
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    DAMAGE[how](file)


CHECKPOINT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "linear_spec_lora/adapter_config.json",
    "linear_spec_lora/adapter_model.safetensors",
]


@pytest.mark.parametrize(("name", "how"), damages(*CHECKPOINT_FILES))
def test_build_over_a_damaged_checkpoint(
    command: Callable[..., Done], checkpoint: Path, tmp_path: Path, name: str, how: str
) -> None:
    damage(checkpoint / name, how)
    output = tmp_path / "output"
    done = command("build", checkpoint, "-o", output)
    assert_clean(done, may_end_well=how in MAY_END_WELL.get(Path(name).name, ()))
    assert output.exists() is (done.code == 0)
    assert (
        {path.name for path in tmp_path.iterdir()} == {"checkpoint", "output"}
        if done.code == 0
        else {"checkpoint"}
    )


BUNDLE_FILES = [
    "manifest.json",
    "weights.safetensors",
    "ar.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "sampler.onnx",
]


@pytest.mark.parametrize(("name", "how"), damages(*BUNDLE_FILES))
def test_run_over_a_damaged_bundle(
    command: Callable[..., Done], bundle: Path, name: str, how: str
) -> None:
    damage(bundle / name, how)
    assert_clean(command("run", bundle, *PROMPT), may_end_well=False)


@pytest.mark.parametrize("how", DAMAGE)
def test_inspect_and_targets_over_a_damaged_manifest(
    command: Callable[..., Done], bundle: Path, how: str
) -> None:
    damage(bundle / "manifest.json", how)
    assert_clean(command("inspect", bundle), may_end_well=False)
    assert_clean(command("inspect", bundle, "--json"), may_end_well=False)
    assert_clean(command("build", DEMO, "-o", bundle), may_end_well=False)


@pytest.mark.parametrize("how", DAMAGE)
def test_prompts_files(
    command: Callable[..., Done], pristine: Path, tmp_path: Path, how: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Add 1 and 2."}\n{"token_ids": [12, 13]}\n')
    damage(file, how)
    assert_clean(
        command("run", pristine, "--prompts-file", file, "--max-new-tokens", 2, "--json"),
        may_end_well=False,
        most_errors=3,
    )
    assert_clean(
        command("bench", pristine, "--prompts-file", file, "--repeats", 1), may_end_well=False
    )
    assert_clean(
        command(
            "calibrate", DEMO, "--precision", "int8", "--data", file, "-o", tmp_path / "scales"
        ),
        may_end_well=False,
    )
    assert_clean(
        command("calibrate", "drafter", DEMO, "--data", file, "-o", tmp_path / "adapter"),
        may_end_well=False,
    )
    assert_clean(
        command("calibrate", "sampler", DEMO, "--data", file, "-o", tmp_path / "sampler"),
        may_end_well=False,
    )
    assert_clean(
        command("verify", pristine, "--against", DEMO, "--prompts-file", file), may_end_well=False
    )
    report = (
        "report",
        "quantization",
        DEMO,
        "--calibration",
        "rtn-int8",
        "--data",
        file,
        "-o",
        tmp_path / "report",
    )
    assert_clean(command(*report), may_end_well=False)
    assert [path.name for path in tmp_path.iterdir()] in (["prompts.jsonl"], [])


@pytest.mark.parametrize(("name", "how"), damages("sampler.json", "sampler.safetensors"))
def test_build_with_a_damaged_sampler(
    command: Callable[..., Done], tmp_path: Path, name: str, how: str
) -> None:
    sampler = shutil.copytree(SAMPLER, tmp_path / "sampler")
    damage(sampler / name, how)
    assert_clean(
        command("build", DEMO, "-o", tmp_path / "output", "--sampler", sampler), may_end_well=False
    )
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("how", DAMAGE)
def test_timings_and_verification(
    command: Callable[..., Done], bundle: Path, tmp_path: Path, how: str
) -> None:
    timings = tmp_path / "timings.json"
    timings.write_text("{}")
    damage(timings, how)
    assert_clean(
        command("run", bundle, "--mode", "auto", "--timings", timings, *PROMPT), may_end_well=False
    )
    (bundle / "verification.json").write_text("{}")
    damage(bundle / "verification.json", how)
    assert_clean(command("inspect", bundle), may_end_well=True)


VALUES = (None, True, -1, 0, 1e308, "x", "\ud83d", [], [1, "x"], {}, {"x": [None]}, 10**30)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "linear_spec_lora/adapter_config.json",
    ],
)
def test_each_field_of_a_checkpoint_with_other_values(
    command: Callable[..., Done], checkpoint: Path, tmp_path: Path, name: str
) -> None:
    """Sizes are left out of what may be built: a model of another size is refused by its
    tensors.
    """
    file, output = checkpoint / name, tmp_path / "output"
    values = json.loads(file.read_text())
    rng = random.Random(5)
    for key in values:
        for value in rng.sample(VALUES, 2):
            file.write_text(json.dumps({**values, key: value}))
            done = command("build", checkpoint, "-o", output)
            assert_clean(done, may_end_well=True)
            shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_field_of_a_manifest_with_other_values(
    command: Callable[..., Done], bundle: Path, depth: int
) -> None:
    file = bundle / "manifest.json"
    values = json.loads(file.read_text())
    file.unlink()
    rng = random.Random(depth)
    for path in _paths(values, depth):
        changed = json.loads(json.dumps(values))
        place = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = rng.choice(VALUES)
        file.write_text(json.dumps(changed))
        assert_clean(command("inspect", bundle, "--json"), may_end_well=True)


def _paths(value: object, depth: int) -> Iterator[tuple[object, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        if depth == 1:
            yield (key,)
        else:
            yield from ((key, *rest) for rest in _paths(inner, depth - 1))
