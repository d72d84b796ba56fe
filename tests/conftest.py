from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from checkpoints import SHAPES, config_of, write_checkpoint
from reference import Reference

from trimode.compiler import traced
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.graphs.checkpoint import Checkpoint
from trimode.graphs.contract import ModelInfo, Role
from trimode.graphs.trace import trace_role
from trimode.runtime import TriModeModel

# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands that a test starts keep graphs and engines in a folder of this run, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMODE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _traced_once() -> Iterator[None]:
    """Tracing takes seconds, and builds of one shape trace the same graphs; passes work on copies."""
    graphs: dict[tuple[str, ...], ir.Model] = {}

    def trace(role: Role, checkpoint: Checkpoint, model: ModelInfo) -> ir.Model:
        key = (role, repr(checkpoint.config), model.model_dump_json(), repr(checkpoint.drafter))
        if key not in graphs:
            graphs[key] = trace_role(role, checkpoint.config, model, checkpoint.drafter)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced, "_trace", trace)
        yield


@dataclass(frozen=True)
class Built:
    """A random checkpoint, its bundle opened, and the independent model of the same weights."""

    checkpoint: Path
    bundle: Path
    model: TriModeModel
    reference: Reference


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Build a named shape, once a session."""
    done: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in done:
            changes, dtype, rank, shards = SHAPES[name]
            folder = tmp_path_factory.mktemp(name)
            checkpoint = write_checkpoint(folder / "checkpoint", config_of(**changes), dtype=dtype, rank=rank, shards=shards)
            build_bundle(checkpoint, folder / "bundle")
            model = TriModeModel.from_pretrained(folder / "bundle", num_threads=1)
            done[name] = Built(checkpoint, folder / "bundle", model, Reference(checkpoint))
        return done[name]

    return build


@pytest.fixture(scope="session")
def quadratic(built: Callable[[str], Built], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """The same with the graph of quadratic self-speculation."""
    done: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in done:
            plain, bundle = built(name), tmp_path_factory.mktemp(f"{name}_quadratic") / "bundle"
            build_bundle(plain.checkpoint, bundle, BuildOptions(quadratic=True))
            done[name] = replace(plain, bundle=bundle, model=TriModeModel.from_pretrained(bundle, num_threads=1))
        return done[name]

    return build


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo checkpoint, which has a tokenizer and a chat template."""
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    build_bundle(Path(__file__).parents[1] / "artifacts" / "nld-tiny", bundle)
    return bundle
