"""What engines move, read from their plans: excerpts of real ones, and engines compiled here;
expected bytes are counted by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoints import config_of, write_checkpoint
from onnx import ModelProto, helper
from onnx import TensorProto as T
from typer.testing import CliRunner

from trimode.cli.main import app
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.compiler.plans import text
from trimode.compiler.plans.audit import audit_engine
from trimode.compiler.plans.report import EnginePlan, causes_of, predict_ms, warnings_of
from trimode.compiler.plans.text import parse_program
from trimode.compiler.tensorrt.builder import EngineJob, build_engine
from trimode.errors import UsageError
from trimode.formats.manifest import ProfileRecord
from trimode.formats.plans import Computed, CopyRecord, PlanRecord, UnreadPlan
from trimode.runtime.bundle.open import open_bundle

EXCERPTS = Path(__file__).parent / "plans"
HEADS, KV_HEADS, SIZE, SLOTS, ROWS = 8, 2, 64, 320, 8
CACHE_BYTES = KV_HEADS * SLOTS * SIZE * 2
ONE = (ProfileRecord(batch=(1, 1, 1), rows=(ROWS, ROWS, ROWS)),)
node, value = helper.make_node, helper.make_tensor_value_info


def attention_model(*, query_is_output: bool = False, batch: int | str = 1) -> ModelProto:
    """Grouped-query attention over an updated cache, as the trunk exports it."""
    zero = 0 if isinstance(batch, str) else batch
    sizes = {"s4": [zero, ROWS, -1, SIZE], "sy": [zero, ROWS, HEADS * SIZE], "rows": [ROWS]}
    constants = [
        helper.make_tensor(name, T.INT64, [len(size)], size) for name, size in sizes.items()
    ]
    cache = [batch, KV_HEADS, SLOTS, SIZE]
    heads = {"input_ids": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    # floats of a fixed size would be weights
    inputs = [value(name, T.INT64, [batch, ROWS, count * SIZE]) for name, count in heads.items()]
    inputs += [value(f"past_{name}", T.BFLOAT16, cache) for name in ("k", "v")]
    nodes = []
    for name in heads:
        nodes.append(node("Cast", [name], [f"{name}_bf16"], to=T.BFLOAT16))
        nodes += [
            node("Reshape", [f"{name}_bf16", "s4"], [f"{name}4"]),
            node("Transpose", [f"{name}4"], [f"{name}t"], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        node("TensorScatter", [f"past_{n}", f"{n}t", "past"], [f"present_{n}"], axis=2)
        for n in "kv"
    ]
    nodes += [
        node("Add", ["past", "rows"], ["length"]),
        node(
            "Attention",
            ["input_idst", "present_k", "present_v", "", "", "", "length"],
            ["a"],
            is_causal=1,
        ),
        node("Transpose", ["a"], ["at"], perm=[0, 2, 1, 3]),
        node("Reshape", ["at", "sy"], ["y"]),
    ]
    outputs = [value("y", T.BFLOAT16, [batch, ROWS, HEADS * SIZE])]
    outputs += [value(f"present_{name}", T.BFLOAT16, cache) for name in ("k", "v")]
    if query_is_output:
        outputs.append(value("input_idst", T.BFLOAT16, [batch, HEADS, ROWS, SIZE]))
    graph = helper.make_graph(
        nodes, "g", [*inputs, value("past", T.INT64, [batch])], outputs, constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def product_model(dtype: int, *, is_constant: bool) -> ModelProto:
    """``x (8, 256)`` times a weight ``(512, 256)`` as it lies: bf16, or int4 in blocks of 64."""
    graph_inputs = [value("x", T.INT64, [ROWS, 256])]
    tensors = {"w": (dtype, [512, 256], 512 * 256 * (2 if dtype == T.BFLOAT16 else 0.5))}
    nodes, weight = [node("Cast", ["x"], ["xd"], to=T.BFLOAT16)], "w"
    if dtype == T.INT4:
        tensors["w_scale"] = (T.BFLOAT16, [512, 4], 512 * 4 * 2)
        nodes.append(node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=1, block_size=64))
        weight = "wd"
    constants = []
    for name, (kind, shape, size) in tensors.items():
        if is_constant:
            constants.append(
                T(
                    name=name,
                    data_type=kind,
                    dims=shape,
                    raw_data=bytes(range(64)) * int(size // 64),
                )
            )
        else:
            graph_inputs.append(value(name, kind, shape))
    nodes.append(node("Gemm", ["xd", weight], ["y"], transB=1))
    graph = helper.make_graph(
        nodes, "g", graph_inputs, [value("y", T.BFLOAT16, [ROWS, 512])], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def compile_model(
    folder: Path, model: ModelProto, batch: tuple[int, int, int] | None = None
) -> Path:
    """An engine for SM89."""
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    profiles = (ProfileRecord(batch=batch, rows=(1, 1, 1)),) if batch else ()
    build_engine(
        EngineJob(
            library="tensorrt_rtx",
            graph=folder / "m.onnx",
            packs=(),
            output=folder / "m.engine",
            compute_capability="8.9",
            profiles=profiles,
        ),
        lambda _: True,
    )
    return folder / "m.engine"


def read(path: Path, profiles: tuple[ProfileRecord, ...] = ONE) -> tuple[PlanRecord, ...]:
    found = audit_engine(path, "tensorrt_rtx 1.7", profiles)
    assert isinstance(found, tuple), found.reason
    return found


def test_an_excerpt_with_repeated_keys_and_values() -> None:
    (record,) = read(EXCERPTS / "attention_repeats.txt")
    assert record.keys_values == 2 * CACHE_BYTES
    assert record.weights == 0
    # Eight heads instead of two, written once and read once, of keys and of values.
    assert causes_of(record) == {
        "keys and values repeated": 2 * 2 * (HEADS // KV_HEADS) * CACHE_BYTES
    }
    assert record.ratio == pytest.approx(9)
    assert {copy.kernel for copy in record.copies} == {
        "__myl_ReshReplReshMoveTran",
        "__myl_ReshReplReshMove",
    }


def test_sizes_that_depend_on_the_batch_are_computed() -> None:
    for batch in (1, 3):
        profile = ProfileRecord(batch=(1, batch, 4), rows=(1, 1, 1))
        (record,) = read(EXCERPTS / "attention_batches.txt", (profile,))
        assert record.keys_values == batch * 2 * CACHE_BYTES
        assert record.copied == batch * 4 * (HEADS // KV_HEADS) * CACHE_BYTES


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("descriptors {", "tensors {", "no section descriptors"),
        ("type=bf16", "type=bf17", "the type bf17"),
        ("  function={", "  routine={", "a kernel of kind routine"),
        (" dims={", " sizes={", "found a tensor with"),
        ("  tensor={", "  array={", "a descriptor of kind array"),
        ('name="present_k.1"', 'name="present_q.1"', "found no tensor present_k.1"),
        ("inputs={", "given={", "without inputs"),
        ("header {\n  version = ", "header {\n  edition = ", "no program"),
        ("past_k.1", "past_k [profile 1].1", "profiles"),
        ("  mul={", "  times={", "no step that computes the size"),
    ],
)
def test_what_is_not_understood_is_said(tmp_path: Path, old: str, new: str, reason: str) -> None:
    whole = (EXCERPTS / "attention_batches.txt").read_text(encoding="latin1")
    if old == "past_k.1":
        old, new = '"input_ids.1"', '"input_ids [profile 1].1"'
    assert old in whole
    (tmp_path / "m.engine").write_text(whole.replace(old, new), encoding="latin1")
    found = audit_engine(
        tmp_path / "m.engine", "tensorrt_rtx 9.9", (ProfileRecord(batch=(1, 2, 4), rows=(1, 1, 1)),)
    )
    assert isinstance(found, UnreadPlan)
    assert reason in found.reason
    (line,) = warnings_of([EnginePlan("bf16", "rtx-4090", "ar", found)])
    assert "plan not understood: found" in line
    assert line.endswith("(tensorrt_rtx 9.9)")


def test_a_damaged_text_is_no_fault_of_the_reader(tmp_path: Path) -> None:
    whole, rng = (EXCERPTS / "attention_batches.txt").read_text(encoding="latin1"), Random(1)
    profile = ProfileRecord(batch=(1, 2, 4), rows=(1, 1, 1))
    begin = whole.index("  region")
    (tmp_path / "m.engine").write_text(whole.replace(" size=", " sighs="), encoding="latin1")
    assert isinstance(audit_engine(tmp_path / "m.engine", "it", (profile,)), UnreadPlan)
    for number in range(600):
        place = rng.randrange(begin, begin + 400 if number < 200 else len(whole))
        length, put = rng.choice((0, 1, 3, 20, 100)), rng.choice('{}"= \n9-ab')
        text_of = whole[:place] + put + whole[place + length :]
        (tmp_path / "m.engine").write_text(text_of, encoding="latin1")
        audit_engine(tmp_path / "m.engine", "it", (profile,))  # nothing is raised


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    for content in (b"", b"vtrt" + bytes(1000)):
        (tmp_path / "m.engine").write_bytes(content)
        assert isinstance(audit_engine(tmp_path / "m.engine", "it", ONE), UnreadPlan)
    assert isinstance(audit_engine(tmp_path / "none", "it", ONE), UnreadPlan)
    # a profile is missing
    assert isinstance(audit_engine(EXCERPTS / "attention_repeats.txt", "it", ONE * 2), UnreadPlan)


def test_views_are_the_tensors_that_they_show() -> None:
    program = parse_program((EXCERPTS / "attention_repeats.txt").read_text(encoding="latin1"))
    views = [tensor for tensor in program.tensors.values() if tensor.base is not None]
    assert all(tensor.base in program.tensors for tensor in views)
    assert "present_k.1" in program.inputs
    assert "present_k.1" in program.outputs


def test_compiled_attention_repeats_the_cache_unless_its_query_is_an_output(tmp_path: Path) -> None:
    (before,) = read(compile_model(tmp_path, attention_model()))
    (after,) = read(compile_model(tmp_path, attention_model(query_is_output=True)))
    assert before.keys_values == after.keys_values == 2 * CACHE_BYTES
    assert (before.copied, after.copied) == (4 * (HEADS // KV_HEADS) * CACHE_BYTES, 0)


def test_compiled_products_read_weights_once(tmp_path: Path) -> None:
    for is_constant in (False, True):
        (record,) = read(
            compile_model(tmp_path, product_model(T.BFLOAT16, is_constant=is_constant))
        )
        assert (record.weights, record.copied) == (512 * 256 * 2, 0)


def test_compiled_int4_weights_are_expanded_as_inputs_and_fused_as_constants(
    tmp_path: Path,
) -> None:
    stored = 512 * 256 // 2 + 512 * 4 * 2
    (given,) = read(compile_model(tmp_path, product_model(T.INT4, is_constant=False)))
    (held,) = read(compile_model(tmp_path, product_model(T.INT4, is_constant=True)))
    assert given.weights == held.weights == stored
    assert held.copied == 0
    assert list(causes_of(given)) == ["weights expanded"]
    assert given.copied >= 2 * 512 * 256 * 2  # bf16, written and read


def record_of(copied: int = 0) -> PlanRecord:
    copies = (CopyRecord(cause="weights expanded", kernel="k", num_bytes=copied),) if copied else ()
    return PlanRecord(
        library="it",
        profile=0,
        batch=1,
        rows=8,
        kernels=1,
        weights=800,
        keys_values=200,
        activations=5000,
        copies=copies,
        scratch=0,
    )


def test_a_warning_says_the_cause_once_an_engine() -> None:
    plans = [EnginePlan("fp8", "l4", "verify", (record_of(), record_of(101), record_of(500)))]
    (line,) = warnings_of(plans)
    assert line == (
        "warning: fp8 l4 verify: a forward of 8 rows moves 1.5 times the bytes of its weights, "
        "keys and values: weights expanded (0.0 MB)"
    )
    assert (
        list(warnings_of([EnginePlan("fp8", "l4", "verify", (record_of(), record_of(100)))])) == []
    )


def test_milliseconds_are_bytes_by_bandwidth() -> None:
    record = record_of(2000)
    assert record.moved == 8000
    assert predict_ms(record, "rtx-4090") == pytest.approx(8000 / 1008e9 * 1e3)
    assert predict_ms(record, "sm89") is None


def test_inspect_shows_what_engines_move(tmp_path: Path) -> None:
    config = config_of(num_hidden_layers=1)
    options = BuildOptions(targets=("rtx-4090", "cpu"), precision="bf16", block_lengths=(8,))
    build_bundle(write_checkpoint(tmp_path / "c", config), tmp_path / "b", options)
    run = CliRunner().invoke
    data = json.loads(run(app, ["inspect", str(tmp_path / "b"), "--plans", "--json"]).stdout)
    assert [(one["target"], one["graph"]) for one in data] == [
        ("rtx-4090", graph_name) for graph_name in ("ar", "draft", "verify")
    ]
    cache_bytes = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    for one in data:
        for profile in one["profiles"]:
            assert profile["library"].startswith("tensorrt_rtx 1.")
            assert profile["keys_values"] % cache_bytes == 0
            assert profile["moved"] == sum(
                profile[part] for part in ("weights", "keys_values", "activations")
            ) + sum(copy["num_bytes"] for copy in profile["copies"])
            assert profile["predicted_ms"] == pytest.approx(profile["moved"] / 1008e6)
    table = run(app, ["inspect", str(tmp_path / "b"), "--plans", "--target", "rtx-4090"]).stdout
    assert "bf16 rtx-4090 ar" in table
    assert "Computed from the plans, not measured" in table


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of one layer; nobody may change it."""
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder / "it", config_of(num_hidden_layers=1))
    options = BuildOptions(
        targets=("rtx-4090", "sm89", "cpu"),
        precision="bf16",
        block_lengths=(8,),
        cache=folder / "c",
    )
    build_bundle(folder / "it", folder / "b", options)
    return folder


def plans_of(bundle: Path) -> Any:
    return json.loads(CliRunner().invoke(app, ["inspect", str(bundle), "--plans", "--json"]).stdout)


def without_records(bundle: Path, copy: Path) -> Path:
    """The bundle as it was written before manifests had plans and revisions."""
    shutil.copytree(bundle, copy)
    data = json.loads((copy / "manifest.json").read_text())
    for target in data["precisions"]["bf16"]["targets"].values():
        target.pop("revision", None)
        for engine in target["graphs"].values():
            engine.pop("plans", None)
    (copy / "manifest.json").write_text(json.dumps(data))
    return copy


def test_the_manifest_has_the_plan_of_each_profile(small: Path, tmp_path: Path) -> None:
    manifest = open_bundle(small / "b").manifest
    targets = manifest.precisions["bf16"].targets
    assert all(engine.plans == () for engine in targets["cpu"].graphs.values())
    for name, bandwidth in {"rtx-4090": 1008, "sm89": None}.items():
        for engine in targets[name].graphs.values():
            counted = [plan.model_copy(update={"computed": None}) for plan in engine.plans]
            library = targets[name].library
            found = audit_engine(small / "b" / engine.file, library, engine.profiles)
            assert tuple(counted) == found
            for plan in engine.plans:
                moved = plan.weights + plan.keys_values + plan.activations + plan.copied
                floor = plan.weights + plan.keys_values
                predicted = None if bandwidth is None else moved / (bandwidth * 1e6)
                assert plan.computed == Computed(
                    floor=floor, moved=moved, bandwidth_gb_s=bandwidth, predicted_ms=predicted
                )


def test_inspect_takes_the_record_and_else_the_plan(small: Path, tmp_path: Path) -> None:
    older = without_records(small / "b", tmp_path / "older")
    assert plans_of(older) == plans_of(small / "b")
    damaged = shutil.copytree(small / "b", tmp_path / "damaged")
    for engine in damaged.glob("engines/*/*.engine"):  # the record is enough
        engine.write_bytes(bytes(engine.stat().st_size))
    assert plans_of(damaged) == plans_of(small / "b")
    for engine in older.glob("engines/*/*.engine"):
        engine.write_bytes(bytes(engine.stat().st_size))
    assert all("not_understood" in one for one in plans_of(older))


def test_engines_from_the_cache_have_their_plans_too(small: Path, tmp_path: Path) -> None:
    options = BuildOptions(targets=("l4",), precision="bf16", block_lengths=(8,), cache=small / "c")
    older = without_records(small / "b", tmp_path / "older")
    like = open_bundle(small / "b").manifest.precisions["bf16"].targets["sm89"].graphs
    for bundle in (older, tmp_path / "new"):
        result = build_bundle(small / "it", bundle, options)
        assert result.num_cached == 3
        for graph_name, engine in result.record.targets["l4"].graphs.items():
            there = like[graph_name].plans
            assert [plan.moved for plan in engine.plans] == [plan.moved for plan in there]
            found = {plan.computed and plan.computed.bandwidth_gb_s for plan in engine.plans}
            assert found == {300}
    assert build_bundle(small / "it", older, options).built == ()


def test_a_plan_that_is_not_understood_is_not_recorded(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_HEADER", b"of another version")
    arguments = ["build", str(small / "it"), "-o", str(tmp_path / "b"), "--target", "sm89"]
    monkeypatch.setenv("TRIMODE_CACHE", str(small / "c"))
    result = CliRunner().invoke(app, [*arguments, "--block-lengths", "8"])
    assert result.stderr.count("plan not understood: found no program") == 3
    assert '"plans"' not in (tmp_path / "b" / "manifest.json").read_text()


def fails(*arguments: str) -> UsageError:
    error = CliRunner().invoke(app, list(arguments)).exception
    assert isinstance(error, UsageError)
    return error


def test_targets_that_hold_no_plans(tmp_path: Path) -> None:
    build_bundle(
        write_checkpoint(tmp_path / "c", config_of(num_hidden_layers=1)),
        tmp_path / "b",
        BuildOptions(targets=("cpu",)),
    )
    bundle: Any = str(tmp_path / "b")
    assert "found cpu" in fails("inspect", bundle, "--plans").message
    assert "found l4" in fails("inspect", bundle, "--plans", "--target", "l4").message
    assert fails("inspect", bundle, "--target", "cpu").hint == "add --plans, or leave --target out"
