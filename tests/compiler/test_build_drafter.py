"""Another drafter: ``trimode build --drafter``, ``trimode verify --drafter`` and ``trimode
calibrate drafter`` as a user meets them.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import config_of, write_checkpoint, write_int8_calibration
from typer.testing import CliRunner

from trimode.calib.reference.torch_session import TorchSession, load_trunk
from trimode.cli.main import app
from trimode.cli.verify import run_verify
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.errors import CheckpointError, TrimodeError, UsageError
from trimode.formats.contract import GraphName
from trimode.graphs.adapter import ADAPTER_FOLDER
from trimode.graphs.checkpoint import open_checkpoint
from trimode.graphs.identity import SourceDigest, stamp_of
from trimode.runtime import TriModeModel
from trimode.runtime.sessions.base import Array, Session

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_size": 8,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "it", config_of(**SMALL), rank=2)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another rank, with weights of its own."""
    return (
        write_checkpoint(tmp_path_factory.mktemp("a") / "other", config_of(**SMALL), rank=3, seed=4)
        / ADAPTER_FOLDER
    )


def digests(checkpoint: Path, adapter: Path | None = None) -> tuple[str, str]:
    """Of the base and of the whole."""
    digest = SourceDigest(open_checkpoint(checkpoint, adapter))
    list(digest.read_all())
    return digest.base_hexdigest(), digest.hexdigest()


def run(session: Session, graph_name: GraphName, drafter_scale: float = 0.0) -> tuple[Array, ...]:
    """A block after a prompt."""
    cache = session.new_cache()
    cache.reserve(64)
    session.run("ar", cache, np.arange(20, 31)[None], 0)
    block = np.full((1, 8), 100, np.int64)
    block[0, 0] = 31
    return tuple(
        np.array(array) for array in session.run(graph_name, cache, block, 11, drafter_scale)
    )


def test_digests_of_base_and_whole(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    base, whole = digests(checkpoint)
    other_base, other_whole = digests(checkpoint, adapter)
    assert base == other_base
    assert len({base, whole, other_whole}) == 3
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns(ADAPTER_FOLDER))
    assert digests(bare) == (base, base)
    assert digests(bare, adapter) == (base, other_whole)
    louder = shutil.copytree(adapter, tmp_path / "louder")
    config = json.loads((louder / "adapter_config.json").read_text())
    (louder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert digests(checkpoint, louder)[0] == base
    assert digests(checkpoint, louder)[1] != other_whole
    stamps = {stamp_of(open_checkpoint(checkpoint, one)) for one in (None, adapter, louder)}
    assert len(stamps) == 3
    assert stamp_of(open_checkpoint(checkpoint, checkpoint / ADAPTER_FOLDER)) == stamp_of(
        open_checkpoint(checkpoint)
    )


def test_the_draft_graph_computes_with_the_other_adapter(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=adapter))
    with TriModeModel.from_pretrained(tmp_path / "b", num_threads=1) as model:
        theirs, own = (
            TorchSession(load_trunk(open_checkpoint(checkpoint, one), model.model.num_positions))
            for one in (adapter, None)
        )
        ids, probabilities = run(model.session, "draft", 1.0)
        expected_ids, expected = run(theirs, "draft", 1.0)
        assert np.array_equal(ids[..., 0], expected_ids[..., 0])
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
        assert np.abs(run(own, "draft", 1.0)[1] - expected).max() > 1e-3
        assert np.array_equal(run(model.session, "verify")[0], run(own, "verify")[0])
        ar = model.ar_generate([[20, 21, 22]], max_new_tokens=20)[0]
        assert np.array_equal(
            model.linear_spec_generate([[20, 21, 22]], max_new_tokens=20, block_length=8)[0], ar
        )


def test_a_checkpoint_without_an_adapter_is_given_one(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "it"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns(ADAPTER_FOLDER))
    result = build_bundle(bare, tmp_path / "b", BuildOptions(drafter=adapter))
    assert result.manifest.model.has_drafter
    assert result.manifest.source.sha256 == digests(checkpoint, adapter)[1]


def test_a_bundle_has_one_drafter(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=adapter))
    assert build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=adapter)).built == ()
    copied = shutil.copytree(adapter, tmp_path / "copied")
    assert build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=copied)).built == ()
    with pytest.raises(
        UsageError,
        match=(
            r"expected a bundle of .* with the drafter .*linear_spec_lora, found one of other "
            r"weights"
        ),
    ):
        build_bundle(checkpoint, tmp_path / "b")


def test_one_calibration_serves_every_drafter(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    calibration = write_int8_calibration(checkpoint, tmp_path / "cal")
    manifest = build_bundle(
        checkpoint, tmp_path / "b", BuildOptions(calibration=calibration, drafter=adapter)
    ).manifest
    assert list(manifest.precisions) == ["int8"]


@pytest.mark.parametrize("found", ["nothing", "a file", "other shapes"])
def test_what_is_no_adapter_of_this_checkpoint(
    checkpoint: Path, tmp_path: Path, found: str
) -> None:
    given = tmp_path / "given"
    if found == "a file":
        given.write_text("")
    elif found == "other shapes":
        given = write_checkpoint(tmp_path / "wide", config_of(), rank=2) / ADAPTER_FOLDER
    with pytest.raises(
        CheckpointError,
        match="expected the folder of a drafter adapter" if found != "other shapes" else "expected",
    ):
        build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=given))
    assert not (tmp_path / "b").exists()


def test_verify_with_the_drafter(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=adapter))
    assert run_verify(
        tmp_path / "b",
        checkpoint,
        threads=1,
        max_new_tokens=8,
        long=40,
        as_json=True,
        drafter=adapter,
    )
    assert json.loads(capsys.readouterr().out)["checkpoint"]["is_source"]


# The command that makes one


def write_prompts(path: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(1)
    path.write_text(
        "".join(
            json.dumps({"token_ids": rng.integers(12, 99, 5).tolist()}) + "\n" for _ in range(count)
        )
    )
    return path


def test_from_prompts_to_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl")
    words = [
        "calibrate",
        "drafter",
        checkpoint,
        "-o",
        tmp_path / "adapter",
        "--data",
        data,
        "--steps",
        3,
        "--max-new-tokens",
        12,
        "--held-out",
        3,
    ]
    done = CliRunner().invoke(
        app, [str(word) for word in [*words, "--json", "--from-scratch", "--rank", 5]]
    )
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["training"]["steps"], record["held_out"]["trained"]["num_prompts"]) == (3, 3)
    assert record["source_sha256"] == digests(checkpoint)[0]
    shown = CliRunner().invoke(app, [str(word) for word in words])
    assert shown.exit_code == 0, shown.output
    for text in ("acceptance length", "held out", "the checkpoint's", "trained", "3/3"):
        assert text in shown.stdout
    assert str(tmp_path / "adapter") in shown.stderr
    build_bundle(checkpoint, tmp_path / "b", BuildOptions(drafter=tmp_path / "adapter"))


def test_data_without_a_prompt(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    words = [
        "calibrate",
        "drafter",
        str(checkpoint),
        "-o",
        str(tmp_path / "adapter"),
        "--data",
        str(tmp_path / "empty.jsonl"),
    ]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, TrimodeError)
    assert done.exception.exit_code == 2
    assert "at least one prompt" in done.exception.message


def test_an_interrupt_says_how_to_go_on(checkpoint: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl")
    command = [
        sys.executable,
        "-m",
        "trimode.cli.main",
        "calibrate",
        "drafter",
        str(checkpoint),
        "-o",
        str(tmp_path / "adapter"),
        "--data",
        str(data),
        "--minutes",
        "5",
        "--max-new-tokens",
        "12",
    ]
    # A runner may have started the tests with interrupts ignored, which children inherit.
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as training:
        assert training.stderr is not None
        assert [training.stderr.readline() for _ in range(3)] == [
            "read checkpoint ...\n",
            "write answers ...\n",
            "train ...\n",
        ]
        training.send_signal(signal.SIGINT)
        rest = training.stderr.read()
    assert training.returncode == 130
    assert "--resume goes on from" in rest
    assert "Traceback" not in rest
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "adapter.state.pt"}
