"""A base checkpoint has no chat template: every command takes its prompts as plain text. Others
take conversations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import trimode

from trimode.compiler.pipeline import build_bundle
from trimode.formats.files import sha256_of
from trimode.runtime import TriModeModel
from trimode.runtime.text.codec import TextCodec

DEMO = Path(__file__).parents[2] / "artifacts" / "nld-tiny"
TEXT = "Add 478 and 356."
USER = {"role": "user", "content": TEXT}
SYSTEM = {"role": "system", "content": "Be brief."}
NOTE = "there is no chat template, as in a base model: texts are taken as they are"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint without a template, and its bundle."""
    folder = tmp_path_factory.mktemp("base")
    checkpoint = Path(shutil.copytree(DEMO, folder / "checkpoint"))
    (checkpoint / "chat_template.jinja").unlink()
    build_bundle(checkpoint, folder / "bundle")
    return checkpoint, folder / "bundle"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"Add {n} and 356."}) + "\n" for n in range(478, 490))
    )
    return file


def answer(bundle: Path, token_ids: list[int]) -> list[int]:
    with TriModeModel.from_pretrained(bundle, num_threads=1) as model:
        return model.ar_generate([token_ids], max_new_tokens=4)[0][0, len(token_ids) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_run_answers_plain_text(base: tuple[Path, Path], prompts: Path, raw: list[str]) -> None:
    expected = answer(base[1], TextCodec(base[1]).encode(TEXT))
    for source, batch in (
        (["--prompt", TEXT], []),
        (["--prompts-file", prompts], []),
        (["--prompts-file", prompts], ["--batch", 3]),
    ):
        done = trimode(
            "run", base[1], *source, "--mode", "ar", "--max-new-tokens", 4, "--json", *raw, *batch
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[0])["token_ids"] == expected
        assert done.stderr.count(NOTE) == (not raw)


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_every_other_command_takes_plain_text(
    base: tuple[Path, Path], prompts: Path, tmp_path: Path, raw: list[str]
) -> None:
    checkpoint, bundle = base
    few = ("--max-new-tokens", 4)
    commands: list[tuple[object, ...]] = [
        (
            "calibrate",
            checkpoint,
            "--precision",
            "int8",
            "--data",
            prompts,
            "-o",
            tmp_path / "cal",
            *few,
        ),
        ("bench", bundle, "--prompts-file", prompts, "--repeats", 1, "--rows", "1,4", "--past", 8),
        (
            "report",
            "quantization",
            checkpoint,
            "--calibration",
            "rtn-int8",
            "--data",
            prompts,
            "-o",
            tmp_path / "rep",
            "--no-figure",
            *few,
        ),
        ("verify", bundle, "--against", checkpoint, "--prompts-file", prompts, "--long", 16, *few),
        (
            "calibrate",
            "sampler",
            checkpoint,
            "--data",
            prompts,
            "-o",
            tmp_path / "sam",
            "--steps",
            2,
            "--block-length",
            4,
            *few,
        ),
    ]
    for command in commands:
        done = trimode(*command, *raw)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr.count(NOTE) == (not raw), done.stderr
    record = json.loads((tmp_path / "cal" / "calibration.json").read_text())
    assert record["data"]["sha256"] == sha256_of(prompts)


def test_a_base_model_is_asked_for_no_conversation(
    base: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    for options in (["--system", "x"], ["--enable-thinking"]):
        done = trimode("run", base[1], "--prompt", TEXT, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert "expected a chat template" in done.stderr
        assert "plain text" in done.stderr
        done = trimode(
            "calibrate",
            base[0],
            "--precision",
            "int8",
            "--data",
            prompts,
            "-o",
            tmp_path / "out",
            *options,
        )
        assert done.returncode == 2
        assert "expected a chat template" in done.stderr
    assert not (tmp_path / "out").exists()


def test_conversations(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [
        {"messages": [SYSTEM, USER]},
        {"messages": [USER]},
        {"prompt": TEXT},
        {"messages": [{"role": "user", "content": 1}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    codec = TextCodec(demo)
    long, short = (
        answer(demo, codec.encode_chat(messages)) for messages in ([SYSTEM, USER], [USER])
    )
    command = ("run", demo, "--mode", "ar", "--max-new-tokens", 4, "--json")
    done = trimode(*command, "--prompts-file", file)
    assert done.returncode == 2
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record.get("token_ids") for record in records] == [long, short, short, None]
    assert records[3]["line"] == 4
    done = trimode(*command, "--prompts-file", file, "--system", "Be brief.")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record.get("token_ids") for record in records] == [None, long, long, None]
    assert "leave out --system" in done.stderr
    done = trimode(*command, "--prompt", TEXT, "--system", "Be brief.", "--no-enable-thinking")
    assert json.loads(done.stdout)["token_ids"] == long


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt", "a", "--raw", "--system", "b"],
        ["--prompt", "a", "--raw", "--enable-thinking"],
        ["--token-ids", "1", "--system", "b"],
        ["--token-ids", "1", "--no-enable-thinking"],
        ["--prompt", "a", "--system", ""],
    ],
)
def test_contradictions(demo: Path, options: list[str]) -> None:
    done = trimode("run", demo, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "hint:" in done.stderr


def test_thinking_reaches_the_template(tmp_path: Path) -> None:
    """Of a checkpoint whose template asks for it."""
    checkpoint = Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
    (checkpoint / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if enable_thinking %}{{ extra or 'Sort' }}{% endif %}"
    )
    build_bundle(checkpoint, tmp_path / "bundle")
    codec = TextCodec(tmp_path / "bundle")
    off, on, more = (
        answer(tmp_path / "bundle", codec.encode(TEXT + end)) for end in ("", "Sort", "JSON:")
    )
    file = tmp_path / "p.jsonl"
    lines = [
        {"prompt": TEXT},
        {"prompt": TEXT, "enable_thinking": True},
        {"prompt": TEXT, "enable_thinking": False},
        {"prompt": TEXT, "chat_template_kwargs": {"enable_thinking": True, "extra": "JSON:"}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    command = (
        "run",
        tmp_path / "bundle",
        "--mode",
        "ar",
        "--max-new-tokens",
        4,
        "--json",
        "--prompts-file",
        file,
    )
    for options, expected in (
        ([], [off, on, off, more]),
        (["--enable-thinking"], [on, on, off, more]),
        (["--no-enable-thinking"], [off, on, off, more]),
    ):
        done = trimode(*command, *options)
        assert [json.loads(line)["token_ids"] for line in done.stdout.splitlines()] == expected, (
            done.stderr
        )
