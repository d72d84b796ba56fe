from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import SHAPES, config_of, write_checkpoint
from once import TracedOnce, changed_since_made, folder_of_run, made_once
from reference import Reference

from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.store.cache import ContentCache
from trimode.runtime import TriModeModel

# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no worker is left alone with one at the end."""
    longest = ("test_readme_is_true", "test_commands_of_a_guide_run")
    items.sort(key=lambda item: not item.name.startswith(longest))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    return folder_of_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def run_cache(run_folder: Path) -> Iterator[ContentCache]:
    """Commands that a test starts keep graphs and engines in a folder of this run, not in the
    user's cache.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMODE_CACHE", str(run_folder / "cache"))
        yield ContentCache(run_folder / "cache")


@pytest.fixture(scope="session", autouse=True)
def traced_once(run_cache: ContentCache) -> Iterator[TracedOnce]:
    """Tracing takes seconds, and builds of one shape trace the same graphs."""
    with pytest.MonkeyPatch.context() as patch:
        once = TracedOnce(run_cache)
        once.patch(patch)
        yield once


@pytest.fixture(scope="session", autouse=True)
def shared_folders_stay(run_folder: Path) -> Iterator[None]:
    """A test that changes what others read fails the session at its end."""
    yield
    assert changed_since_made(run_folder) == []


@dataclass(frozen=True)
class Built:
    """A random checkpoint, its bundle opened, and the independent model of the same weights."""

    checkpoint: Path
    bundle: Path
    model: TriModeModel
    reference: Reference


@pytest.fixture(scope="session")
def built(run_folder: Path) -> Callable[[str], Built]:
    """A named shape, built once a run and opened once a session. Tests that change files change a
    copy.
    """
    return cache(lambda name: _built(name, run_folder))


@pytest.fixture(scope="session")
def quadratic(built: Callable[[str], Built], run_folder: Path) -> Callable[[str], Built]:
    """The same with the graph of quadratic self-speculation."""
    return cache(lambda name: _quadratic(built(name), run_folder / f"{name}_quadratic"))


@pytest.fixture(scope="session")
def demo(run_folder: Path) -> Path:
    """A bundle of the demo checkpoint, which has a tokenizer and a chat template."""
    checkpoint = Path(__file__).parents[1] / "artifacts" / "nld-tiny"
    return (
        made_once(run_folder / "demo", lambda new: build_bundle(checkpoint, new / "bundle"))
        / "bundle"
    )


def _built(name: str, run_folder: Path) -> Built:
    changes, dtype, rank, shards = SHAPES[name]

    def make(folder: Path) -> None:
        checkpoint = write_checkpoint(
            folder / "checkpoint", config_of(**changes), dtype=dtype, rank=rank, shards=shards
        )
        build_bundle(checkpoint, folder / "bundle")

    folder = made_once(run_folder / name, make)
    model = TriModeModel.from_pretrained(folder / "bundle", num_threads=1)
    return Built(folder / "checkpoint", folder / "bundle", model, Reference(folder / "checkpoint"))


def _quadratic(plain: Built, folder: Path) -> Built:
    made_once(
        folder,
        lambda new: build_bundle(plain.checkpoint, new / "bundle", BuildOptions(quadratic=True)),
    )
    return replace(
        plain,
        bundle=folder / "bundle",
        model=TriModeModel.from_pretrained(folder / "bundle", num_threads=1),
    )
