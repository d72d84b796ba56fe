"""The one way to resume, over both kinds of work: a folder and a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimode.calib.jobs.work import Work
from trimode.calib.scales.work_folder import WorkFolder
from trimode.calib.training.run_state import RunState
from trimode.errors import UsageError

KINDS = [WorkFolder, RunState]
FACTS = {"data": "0" * 64, "modes": ("ar", "draft"), "seed": 3}


def leave(kind: type[Work], output: Path) -> Work:
    """Work as an interrupted run leaves it."""
    with kind.beside(output).opened(FACTS, resume=False) as work:
        if isinstance(work, RunState):
            work.written.append([1, 2])
            work.save()
    return kind.beside(output)


@pytest.mark.parametrize("kind", KINDS)
def test_work_is_resumed_and_discarded(kind: type[Work], tmp_path: Path) -> None:
    work = leave(kind, tmp_path / "out")
    assert work.contents() == "work"
    with work.opened(FACTS, resume=True):
        assert getattr(work, "written", [[1, 2]]) == [[1, 2]]
    work.discard()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="found none"):
        work.check(resume=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "with seed 4, found one with 3"),
        ({"modes": ("ar",)}, r"with modes \['ar'\], found one with \['ar', 'draft'\]"),
        ({"more": True}, "with more True, found one with None"),
    ],
)
def test_work_of_another_run_stays_as_it_is(
    kind: type[Work], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    work = leave(kind, tmp_path / "out")
    with (
        pytest.raises(UsageError, match=message),
        work.opened({**FACTS, **changes}, resume=True),
    ):
        pytest.fail("it was taken up")
    with work.opened(FACTS, resume=True):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_is_left_alone(kind: type[Work], tmp_path: Path) -> None:
    work = kind.beside(tmp_path / "out")
    work.path.mkdir()
    (work.path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="found something else"), work.opened({}, resume=False):
        pytest.fail("it was begun")
    with pytest.raises(UsageError, match="found none"):
        work.check(resume=True)
    assert (work.path / "thesis.tex").read_text() == "years of work"


def test_earlier_work_is_replaced_or_refused(tmp_path: Path) -> None:
    folder, state = (leave(kind, tmp_path / "out") for kind in KINDS)
    folder.check(resume=False)
    with (
        folder.opened({"seed": 9}, resume=False),
        pytest.raises(UsageError, match="expected no other run at work there"),
        folder.opened({"seed": 9}, resume=False),
    ):
        pytest.fail("two runs were at work")
    assert folder.take_up() == {"seed": 9}
    with pytest.raises(UsageError, match="found one that was interrupted"):
        state.check(resume=False)


@pytest.mark.parametrize("content", [b"", b"?", b"PK\x03\x04"])
def test_a_state_that_is_none(tmp_path: Path, content: bytes) -> None:
    state = leave(RunState, tmp_path / "out")
    state.path.write_bytes(content)
    with pytest.raises(UsageError, match="a file that is none"), state.opened({}, resume=True):
        pytest.fail("it was taken up")
    torch.save({"identity": {}}, state.path)
    with pytest.raises(UsageError, match="a file that is none"), state.opened({}, resume=True):
        pytest.fail("it was taken up")
