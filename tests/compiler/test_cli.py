"""The command line as a user meets it: exit codes, streams, JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import config_of, write_checkpoint
from commands import trimode
from conftest import Built

from trimode.cli.parse import parse_biases
from trimode.errors import UsageError

FIELDS = {
    "text",
    "token_ids",
    "mode",
    "nfe",
    "prefill_forwards",
    "tokens_per_forward",
    "acceptance_length",
    "finish_reason",
    "seed",
    "elapsed_s",
}


def test_version_and_help() -> None:
    assert trimode("--version").stdout.startswith("trimode 0.")
    for command in ("build", "run", "inspect", "targets", "verify", "cache"):
        assert command in trimode("--help").stdout
        assert trimode(command, "--help").returncode == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['trimode', '--help']\nfrom trimode.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnx_ir', 'numpy', "
        "'onnxruntime', 'pydantic')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear-spec"])
def test_run_prints_ids_on_stdout_and_a_summary_on_stderr(
    built: Callable[[str], Built], mode: str
) -> None:
    it = built("three_kv_heads")
    done = trimode(
        "run", it.bundle, "--token-ids", "20,21,22", "--mode", mode, "--max-new-tokens", 5
    )
    assert done.returncode == 0, done.stderr
    assert all(0 <= int(i) < 109 for i in done.stdout.strip().split(","))
    for word in ("nfe", "tokens per forward", "tokens/s", mode):
        assert word in done.stderr


def test_json_lines(built: Callable[[str], Built], tmp_path: Path) -> None:
    it = built("three_kv_heads")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"token_ids": [20, 21]}\n\n{"token_ids": [30], "answer": "x"}\n')
    done = trimode(
        "run",
        it.bundle,
        "--prompts-file",
        file,
        "--mode",
        "linear-spec",
        "--json",
        "--max-new-tokens",
        9,
        "--block-length",
        4,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 2
    assert set(records[0]) == FIELDS
    assert set(records[1]) == FIELDS | {"is_exact_match"}
    assert records[0]["mode"] == "linear-spec"
    assert (
        records[0]["token_ids"]
        == it.model.ar_generate([[20, 21]], max_new_tokens=9)[0][0, 2:].tolist()
    )
    assert records[0]["text"] is None  # this bundle has no tokenizer


def test_batches_print_what_single_prompts_print(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    """In the order of the prompts, though the first takes longest."""
    it = built("three_kv_heads")
    file = tmp_path / "prompts.jsonl"
    prompts = [
        {"token_ids": [20, 21]},
        {"token_ids": [30], "answer": "x"},
        {"token_ids": list(range(20, 90))},
        {"token_ids": [50, 51, 52]},
    ]
    file.write_text("\n".join(map(json.dumps, prompts)))
    for options in (["--json"], []):
        command = [
            "run",
            it.bundle,
            "--prompts-file",
            file,
            "--max-new-tokens",
            30,
            "--block-length",
            4,
            *options,
        ]
        alone, together = trimode(*command), trimode(*command, "--batch", 3)
        assert (alone.returncode, together.returncode) == (0, 0), together.stderr
        if options:
            found, expected = (
                [{**json.loads(line), "elapsed_s": 0} for line in done.stdout.splitlines()]
                for done in (together, alone)
            )
            assert found == expected
            assert len(found) == 4
        else:
            assert together.stdout == alone.stdout
            assert together.stderr.count("nfe") == 4
    for wrong in (["--batch", 2], ["--batch", 0]):
        source = ["--token-ids", "20"] if wrong[1] else ["--prompts-file", file]
        refused = trimode("run", it.bundle, *source, *wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "hint:" in refused.stderr


def test_biases_are_pairs_of_token_and_number() -> None:
    assert parse_biases(None) is None
    assert parse_biases(["11=-100", "12=2.5", "13= 1e1"]) == {11: -100.0, 12: 2.5, 13: 10.0}
    for wrong in (["11"], ["11="], ["=1"], ["a=1"], ["11=b"], ["1.5=2"], ["11=1", "11=2"]):
        with pytest.raises(UsageError, match=r"^expected .*--logit-bias.*, found ") as raised:
            parse_biases(wrong)
        assert raised.value.hint


def test_sampling_from_the_command_line(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    sampled = (
        "--temperature",
        1.2,
        "--top-k",
        20,
        "--top-p",
        0.95,
        "--min-p",
        0.01,
        "--repetition-penalty",
        1.1,
        "--presence-penalty",
        0.5,
        "--frequency-penalty",
        -0.2,
        "--logit-bias",
        "60=-0.5",
        "--logit-bias",
        "61=100",
        "--min-new-tokens",
        6,
    )
    command = (
        "run",
        it.bundle,
        "--token-ids",
        "20,21",
        "--max-new-tokens",
        12,
        "--json",
        "--logprobs",
        2,
        *sampled,
    )
    first = json.loads(
        trimode(*command, "--max-thinking-tokens", 4, "--end-think-token-id", 60).stdout
    )
    assert set(first) == FIELDS | {"logprobs"}
    assert 60 in first["token_ids"][:5]
    assert [entry["token_id"] for entry in first["logprobs"]] == first["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in first["logprobs"])
    again = json.loads(
        trimode(
            *command,
            "--max-thinking-tokens",
            4,
            "--end-think-token-id",
            60,
            "--seed",
            first["seed"],
        ).stdout
    )
    assert again["token_ids"] == first["token_ids"]


def test_inspect(built: Callable[[str], Built]) -> None:
    it = built("three_kv_heads")
    shown = trimode("inspect", it.bundle)
    for word in ("weights.safetensors", "verify", "accepted_length", "bidirectional", "adapter"):
        assert word in shown.stdout
    assert json.loads(trimode("inspect", it.bundle, "--json").stdout)["schema_version"] == 5


def test_interruption_is_clean(built: Callable[[str], Built], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "trimode.cli.main",
        "build",
        str(built("three_kv_heads").checkpoint),
        "-o",
        str(tmp_path / "out"),
    ]
    # A runner may have started the tests with interrupts ignored, which children inherit.
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as build:
        assert build.stderr is not None
        assert [build.stderr.readline() for _ in range(2)] == [
            "write weights ...\n",
            "trace graphs ...\n",
        ]
        build.send_signal(signal.SIGINT)
        rest = build.stderr.read()
    assert build.returncode == 130
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe(built: Callable[[str], Built], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"token_ids": [20, 21]}\n' * 50)
    command = [
        sys.executable,
        "-m",
        "trimode.cli.main",
        "run",
        str(built("plain").bundle),
        "--prompts-file",
        str(file),
        "--json",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert "Traceback" not in run.stderr.read()


BAD: dict[str, tuple[list[str], int, str]] = {
    "no bundle": (["run", "nowhere", "--token-ids", "1"], 1, "expected a bundle"),
    "inspect nothing": (["inspect", "nowhere"], 1, "expected a bundle"),
    "no prompt": (["run", "BUNDLE"], 2, "expected one of --prompt"),
    "two prompts": (["run", "BUNDLE", "--prompt", "a", "--token-ids", "1"], 2, "found 2"),
    "empty prompt": (["run", "BUNDLE", "--prompt", ""], 2, "empty"),
    "raw alone": (["run", "BUNDLE", "--token-ids", "1", "--raw"], 2, "--raw"),
    "no tokenizer": (["run", "BUNDLE", "--prompt", "hello"], 2, "tokenizer.json"),
    "unknown mode": (["run", "BUNDLE", "--token-ids", "1", "--mode", "warp"], 2, "--mode"),
    "no ids": (["run", "BUNDLE", "--token-ids", ""], 2, "empty prompt"),
    "ids that are words": (["run", "BUNDLE", "--token-ids", "a,b"], 2, "whole numbers like"),
    "id too large": (["run", "BUNDLE", "--token-ids", "109"], 2, "from 0 to 108, found 109"),
    "id negative": (["run", "BUNDLE", "--token-ids", "5,-3"], 2, "found -3"),
    "prompt too long": (
        ["run", "BUNDLE", "--token-ids", ",".join(["20"] * 1024)],
        2,
        "shorter than 1024",
    ),
    "block 0": (
        ["run", "BUNDLE", "--token-ids", "20", "--block-length", "0"],
        2,
        "from 1 to 64, found 0",
    ),
    "block 65": (
        ["run", "BUNDLE", "--token-ids", "20", "--block-length", "65"],
        2,
        "from 1 to 64, found 65",
    ),
    "threshold 2": (["run", "BUNDLE", "--token-ids", "20", "--threshold", "2"], 2, "from 0 to 1"),
    "temperature -1": (
        ["run", "BUNDLE", "--token-ids", "20", "--temperature", "-1"],
        2,
        "temperature of 0 or more, found -1",
    ),
    "stop without text": (
        ["run", "BUNDLE", "--token-ids", "20", "--stop", "a"],
        2,
        "tokenizer.json",
    ),
    "budget without its token": (
        ["run", "BUNDLE", "--token-ids", "20", "--max-thinking-tokens", "4"],
        2,
        "tokenizer.json",
    ),
    "logprobs in plain text": (
        ["run", "BUNDLE", "--token-ids", "20", "--logprobs", "1"],
        2,
        "--json",
    ),
    "no tokens": (["run", "BUNDLE", "--token-ids", "20", "--max-new-tokens", "0"], 2, "at least 1"),
    "no threads": (
        ["run", "BUNDLE", "--token-ids", "20", "--threads", "0"],
        2,
        "at least 1 thread",
    ),
    "no prompts file": (["run", "BUNDLE", "--prompts-file", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    "no checkpoint": (["build", "nowhere", "-o", "OUT"], 1, "checkpoint folder"),
    "unknown target": (["build", "CHECKPOINT", "-o", "OUT", "--target", "toaster"], 2, "toaster"),
    "unknown option": (["build", "CHECKPOINT", "--frobnicate"], 2, "frobnicate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(built: Callable[[str], Built], tmp_path: Path, case: str) -> None:
    it = built("three_kv_heads")
    args, code, message = BAD[case]
    places = {"BUNDLE": it.bundle, "CHECKPOINT": it.checkpoint, "OUT": tmp_path / "out"}
    done = trimode(*(places.get(a, a) for a in args))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "not json\n",
        "[1]\n",
        "{}\n",
        '{"prompt": ""}\n',
        '{"prompt": "a", "token_ids": [1]}\n',
        '{"token_ids": ["a"]}\n',
        '{"token_ids": [20], "answer": 5}\n',
        '{"token_ids": [20], "answer": []}\n',
        '{"token_ids": [20], "answer": ["a", null]}\n',
    ],
)
def test_bad_prompt_files(built: Callable[[str], Built], tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    done = trimode("run", built("three_kv_heads").bundle, "--prompts-file", file)
    assert done.returncode == 2
    assert "prompts.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_targets_lists_what_this_machine_can_do() -> None:
    by_name = {row["target"]: row for row in json.loads(trimode("targets", "--json").stdout)}
    assert by_name["cpu"]["why_not_build"] is None
    assert by_name["cpu"]["why_not_run"] is None
    assert by_name["rtx-4090"] == {
        "target": "rtx-4090",
        "compute_capability": "8.9",
        "backend": "tensorrt_rtx",
        "precisions": ["bf16", "fp16", "int8", "int4", "fp8"],
        "memory_gb": 24,
        "bandwidth_gb_s": 1008,
        "bandwidth_source": by_name["rtx-4090"]["bandwidth_source"],
        "why_not_build": None,
        "why_not_run": by_name["rtx-4090"]["why_not_run"],
    }
    table = trimode("targets").stdout
    for row in by_name.values():
        assert row["target"] in table
        for reason in (row["why_not_build"], row["why_not_run"]):
            assert reason is None or f"] {reason}" in table


def test_the_cache_is_shown_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path / "cache"))
    empty = json.loads(trimode("cache", "--json").stdout)
    assert (empty["folder"], empty["entries"], empty["num_bytes"], empty["deleted"]) == (
        str(tmp_path / "cache"),
        0,
        0,
        0,
    )
    entry = tmp_path / "cache" / "ab" / ("ab" * 32)
    entry.parent.mkdir(parents=True)
    entry.write_bytes(bytes(10**6))
    arranged, table = (
        tmp_path / "cache" / "prepacked" / ("cd" * 32),
        tmp_path / "cache" / "timings" / "ef.json",
    )
    for path, size in (
        (arranged / "weights.bin", 2 * 10**6),
        (arranged / "ar.onnx", 10**5),
        (table, 10**5),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    assert trimode("cache").stdout.splitlines() == [
        f"{tmp_path / 'cache'}: 3 entries, 3.2 MB",
        "  graphs and engines: 1 entry, 1.0 MB",
        "  arranged weights: 1 entry, 2.1 MB",
        "  timings: 1 entry, 0.1 MB",
    ]
    assert json.loads(trimode("cache", "--json").stdout)["kinds"]["arranged_weights"] == {
        "entries": 1,
        "num_bytes": 2100000,
    }
    cleared = json.loads(trimode("cache", "--clear", "--json").stdout)
    assert (cleared["deleted"], cleared["entries"]) == (2, 1)
    assert not entry.exists()
    assert not arranged.exists()
    assert table.exists()


def test_building_twice_says_so(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config_of(num_hidden_layers=1))
    first = trimode("build", checkpoint, "-o", tmp_path / "bundle", "--json")
    assert json.loads(first.stdout)["built"] == ["cpu"]
    assert "built" in first.stderr
    again = trimode("build", checkpoint, "-o", tmp_path / "bundle")
    assert again.returncode == 0
    assert again.stdout == ""
    assert "is up to date: cpu in fp32" in again.stderr
    assert (
        trimode(
            "build", checkpoint, "-o", tmp_path / "bundle", "--block-lengths", "8;16"
        ).returncode
        == 2
    )


def test_a_bundle_in_sixteen_bits_runs_on_the_cpu(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    """Weights as inputs, widened once: the tokens of the float32 bundle, since the checkpoint has
    16 bits itself.
    """
    checkpoint = built("three_kv_heads").checkpoint
    command = ("--token-ids", "20,21,22", "--max-new-tokens", 20, "--mode", "linear-spec")
    answers = []
    for precision in ("fp32", "bf16"):
        bundle = tmp_path / precision
        done = trimode("build", checkpoint, "-o", bundle, "--precision", precision)
        assert done.returncode == 0, done.stderr
        answers += [
            trimode("run", bundle, *command).stdout,
            trimode("run", bundle, *command, "--target", "portable").stdout,
        ]
    assert answers[0].count(",") >= 8
    assert len(set(answers)) == 1


def test_a_target_that_cannot_run_here(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config_of(num_hidden_layers=1))
    assert (
        trimode(
            "build",
            checkpoint,
            "-o",
            tmp_path / "bundle",
            "--target",
            "sm89",
            "--block-lengths",
            "8",
        ).returncode
        == 0
    )
    fallen_back = trimode("run", tmp_path / "bundle", "--token-ids", "20", "--max-new-tokens", 2)
    assert fallen_back.returncode == 0
    assert "target sm89: " in fallen_back.stderr
    named = trimode("run", tmp_path / "bundle", "--token-ids", "20", "--target", "sm89")
    assert named.returncode == 1
    assert named.stdout == ""
    assert "hint:" in named.stderr
    assert (
        trimode("run", tmp_path / "bundle", "--token-ids", "20", "--target", "t4").returncode == 2
    )
