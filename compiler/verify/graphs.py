"""Each graph against the trunk: several positions, several numbers of rows, the drafter off and on.

Twice: the target's session with its own cache, as decoding uses it; and the portable graphs as
files, on a ragged batch with the cache given, whose updated keys and values are compared too. The
comparing is Polygraphy's.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from trimode.calib.reference.torch_session import TorchCache, TorchSession, accepted_lengths
from trimode.compiler.verify.rounding import SPREAD_FACTOR, Guide
from trimode.compiler.verify.runners import (
    CachedText,
    CodedRunner,
    Feed,
    SessionRunner,
    TrunkRunner,
    portable_runner,
    role_feed,
)
from trimode.compiler.verify.tolerance import Tolerance
from trimode.errors import UsageError
from trimode.formats.contract import (
    ROLES,
    GraphContract,
    ModelInfo,
    Role,
    cache_specs,
    graph_contract,
    slots_written,
)
from trimode.formats.finite import finite_or, is_within, largest
from trimode.formats.verification import GraphParity, IdsRecord, OutputRecord, Subject
from trimode.runtime.sessions.base import Ids, Session

ODD_ROWS = 7
SHORT_POSITION = 11
_GARBAGE_SLOTS = 5


@dataclass(frozen=True)
class Block:
    """New tokens at one position of the text, and how large the reference's logits are there.

    Attributes:
        draft_ids: (1, T): the token of the position, then slots of which most are masked.
        verify_ids: (1, T): the same token, then drafts of which the first half are the reference's
        own.
        scale: the largest absolute logit of the reference over ``verify_ids``.
    """

    position: int
    draft_ids: Ids
    verify_ids: Ids
    scale: float

    @property
    def rows(self) -> int:
        """T."""
        return int(self.draft_ids.shape[1])

    def ids(self, role: Role) -> Ids:
        """The input of a role."""
        return self.draft_ids if role == "draft" else self.verify_ids


def make_block(
    text: CachedText, position: int, rows: int, model: ModelInfo, rng: np.random.Generator
) -> Block:
    """A block at ``position`` of a text that the reference reads."""
    text.read_to(position)
    verify_ids = rng.integers(0, model.vocab_size, (1, rows))
    verify_ids[0, 0] = text.token_ids[position]
    draft_ids = np.where(rng.random((1, rows)) < 0.8, model.mask_token_id, verify_ids)
    draft_ids[0, 0] = text.token_ids[position]
    for slot in range(rows // 2):
        greedy, *_ = text.session.run("verify", text.cache, verify_ids[:, : slot + 1], position)
        verify_ids[0, slot + 1] = greedy[0, slot]
    *_, logits = text.session.run("verify", text.cache, verify_ids, position)
    return Block(position, draft_ids, verify_ids, float(np.abs(np.asarray(logits)).max()))


def row_counts(session: Session, role: Role, model: ModelInfo) -> list[int]:
    """1, an odd number and the block, as far as the graphs were built for them."""

    def is_built(rows: int) -> bool:
        if role == "ar":
            return session.max_prefill_rows is None or rows <= session.max_prefill_rows
        try:
            session.check_block_length(rows, (role,))
        except UsageError:
            return False
        return rows <= (
            model.max_quadratic_length if role == "quadratic" else model.max_block_length
        )

    return sorted({rows for rows in (1, ODD_ROWS, model.block_size) if is_built(rows)})


def count_comparisons(
    session: Session, model: ModelInfo, positions: Sequence[int], roles: Sequence[Role] = ROLES
) -> int:
    """How many records :func:`compare_target` yields."""
    return len(positions) * sum(
        len(row_counts(session, role, model)) * len(_drafter_scales(role, model)) for role in roles
    )


def compare_target(
    reference: CachedText,
    target: CachedText,
    model: ModelInfo,
    positions: Sequence[int],
    tolerance: Tolerance,
    seed: int,
    dithered: Sequence[CachedText] = (),
    roles: Sequence[Role] = ROLES,
) -> Iterator[GraphParity]:
    """The graphs of a target's session; all texts are the same.

    Args:
        reference: the text, read by the trunk.
        target: the text, read by the target.
        model: the bundle's model.
        positions: tokens in the cache, ascending.
        tolerance: of the target.
        seed: of the blocks.
        dithered: the text, read by the trunk as it rounds inputs at random within the bound: how
            far that takes it from ``reference``, times :data:`SPREAD_FACTOR`, is allowed beyond the
            tolerance.
        roles: graphs to compare.
    """
    rng = np.random.default_rng(seed)
    counts = {role: row_counts(target.session, role, model) for role in roles}
    for position in positions:
        blocks = {
            rows: make_block(reference, position, rows, model, rng)
            for rows in sorted({n for role in roles for n in counts[role]})
        }
        for role in roles:
            contract = graph_contract(role, model)
            runners = [
                SessionRunner("reference", reference, contract),
                SessionRunner("target", target, contract),
            ]
            spreading = [SessionRunner("dithered", text, contract) for text in dithered]
            for block in (blocks[rows] for rows in counts[role]):
                for scale in _drafter_scales(role, model):
                    feed = role_feed(role, model, block.ids(role), np.array([position]), scale)
                    yield _compare(
                        "target", contract, runners, feed, block.scale, tolerance, spreading
                    )


def compare_portable(
    reference: CachedText,
    folder: Path,
    files: dict[Role, str],
    model: ModelInfo,
    position: int,
    tolerance: Tolerance,
    seed: int,
    guide: Guide | None = None,
) -> Iterator[GraphParity]:
    """The portable graphs on a ragged batch of two: the text up to ``position``, and up to half of
    it.

    Args:
        reference: the text, read by the trunk.
        folder: the bundle.
        files: the graph of each role that is compared.
        model: the bundle's model.
        position: tokens in the cache of the longer sequence.
        tolerance: of the portable graphs.
        seed: of the blocks and of what lies in unused slots.
        guide: of the trunk, where it quantizes inputs: it then follows the codes that the graph has
            chosen.
    """
    rng = np.random.default_rng(seed)
    blocks = [make_block(reference, at, ODD_ROWS, model, rng) for at in (position // 2, position)]
    past = np.array([block.position for block in blocks])
    capacity = (
        int(past.max()) + max(slots_written(role, ODD_ROWS) for role in files) + _GARBAGE_SLOTS
    )
    caches = _caches(cast("TorchCache", reference.cache), past, capacity, model, rng)
    for role in files:
        contract = graph_contract(role, model)
        if guide is None:
            runners = [
                TrunkRunner("reference", cast("TorchSession", reference.session), model, contract),
                portable_runner("portable", folder / files[role]),
            ]
        else:  # the graph runs first: the reference needs its codes
            graph = CodedRunner("portable", folder / files[role], contract, model)
            followed = (guide, graph, tolerance.relative)
            runners = [
                graph,
                TrunkRunner(
                    "reference", cast("TorchSession", reference.session), model, contract, followed
                ),
            ]
        ids = np.concatenate([block.ids(role) for block in blocks])
        for scale in _drafter_scales(role, model):
            feed = {
                **role_feed(role, model, ids, past, scale, np.array([ODD_ROWS - 2, ODD_ROWS])),
                **caches,
            }
            largest = max(block.scale for block in blocks)
            yield _compare("portable", contract, runners, feed, largest, tolerance)


def _drafter_scales(role: Role, model: ModelInfo) -> tuple[float, ...]:
    return (0.0, 1.0) if role == "draft" and model.has_drafter else (0.0,)


def _caches(
    cache: TorchCache, past: Ids, capacity: int, model: ModelInfo, rng: np.random.Generator
) -> Feed:
    """The first keys and values of the text for each sequence of the batch, noise in the slots
    behind: those must not matter.
    """
    tensors = [part.numpy()[0] for layer in cache.layers for part in layer]  # (G, n, D)
    feed: Feed = {}
    for spec, tensor in zip(cache_specs(model, "past_key_values"), tensors, strict=True):
        values = rng.standard_normal(
            (len(past), tensor.shape[0], capacity, tensor.shape[2]), np.float32
        )
        for index, length in enumerate(past):
            values[index, :, :length] = tensor[:, :length]
        feed[spec.name] = values
    return feed


def _compare(
    subject: Subject,
    contract: GraphContract,
    runners: Sequence[Any],
    feed: Feed,
    scale: float,
    tolerance: Tolerance,
    spreading: Sequence[Any] = (),
) -> GraphParity:
    """Run both in their order and compare the other with the reference; ``spreading`` tell how far
    that is from itself.
    """
    at = [runner.name for runner in runners].index("reference")
    with _quiet():
        run, outputs_of, feed = _run_all(contract.role, runners, spreading, feed)
        reference, found = outputs_of[at], outputs_of[1 - at]
        floats = [name for name, values in reference.items() if values.dtype == np.float32]
        spreads = _spreads(reference, outputs_of[len(runners) :], floats)
        bounds = {
            name: _bounds(name, reference[name], scale, tolerance, spreads[name]) for name in floats
        }
        # Polygraphy is content when either tolerance holds: a relative one of 0 leaves it to the
        # absolute one.
        results = Comparator.compare_accuracy(
            run,
            comparisons=[(1 - at, at)],
            compare_func=[
                SimpleCompareFunc(
                    atol={n: b[1] for n, b in bounds.items()},
                    rtol=0,
                    check_error_stat="max",
                    find_output_func=_only(floats),
                ),
                SimpleCompareFunc(
                    atol={n: b[2] for n, b in bounds.items()},
                    rtol=0,
                    check_error_stat="mean",
                    find_output_func=_only(floats),
                ),
            ],
        )
    (highest,), (mean,) = (next(iter(result.values())) for result in results)
    outputs = [_output(name, highest[name], mean[name], bounds[name]) for name in floats]
    ids = list(_compare_ids(reference, found, scale, tolerance, spreads))
    codes = getattr(runners[at], "codes", None)
    accepted = None
    if "accepted_length" in found:
        accepted = bool(
            (
                found["accepted_length"] == accepted_lengths(found["greedy_ids"], feed["input_ids"])
            ).all()
        )
    return GraphParity(
        subject=subject,
        graph=contract.role,
        positions=tuple(feed["past_length"].tolist()),
        rows=feed["input_ids"].shape[1],
        use_drafter=bool(feed["drafter_scale"]) if "drafter_scale" in feed else None,
        outputs=tuple(_worst_cache(outputs)),
        ids=tuple(ids),
        codes=codes,
        has_accepted_length=accepted,
        passed=all(r.passed for r in outputs)
        and all(r.passed for r in ids)
        and accepted is not False
        and (codes is None or codes.passed),
    )


def _run_all(
    role: Role, runners: Sequence[Any], spreading: Sequence[Any], feed: Feed
) -> tuple[Any, list[Feed], Feed]:
    """Polygraphy's results, the outputs by name of all ``runners`` and then of all ``spreading``,
    and the inputs that gave them.

    What ``quadratic`` returns of the slots behind an accepted length can be compared only where all
    have the same. So where they do not, the draft is cut short. That may take more than one
    attempt, because the dithered ones draw anew in each.
    """
    outputs_of: list[Feed] = []
    for _ in range(feed["input_ids"].shape[1] + 1):
        if outputs_of:
            feed = {**feed, "input_ids": _until_any_parts(feed["input_ids"], outputs_of)}
        (run,) = Comparator.run(list(runners), data_loader=[feed], streaming=True)
        outputs_of = [OrderedDict(results[0].items()) for _, results in run]
        outputs_of += [runner.infer_impl(feed) for runner in spreading]
        if role != "quadratic" or all(
            (outputs["accepted_length"] == outputs_of[0]["accepted_length"]).all()
            for outputs in outputs_of
        ):
            break
    return run, outputs_of, feed


def _until_any_parts(draft: Ids, outputs_of: Sequence[Feed]) -> Ids:
    """The draft with a token that none expects behind the shortest of the accepted lengths."""
    draft = draft.copy()
    for row, last in enumerate(
        np.min([outputs["accepted_length"] for outputs in outputs_of], axis=0).tolist()
    ):
        if last + 1 < draft.shape[1]:
            expected = {int(outputs["greedy_ids"][row, last]) for outputs in outputs_of}
            draft[row, last + 1] = next(
                token for token in range(len(expected) + 1) if token not in expected
            )
    return draft


def _only(names: Iterable[str]) -> Any:
    wanted = set(names)
    return lambda name, _index, _results: [name] if name in wanted else None


class _Spread(NamedTuple):
    """What is allowed beyond the tolerance, of the largest and of the mean error."""

    largest: float = 0.0
    mean: float = 0.0


def _spreads(
    reference: Mapping[str, NDArray[Any]],
    dithered: Sequence[Mapping[str, NDArray[Any]]],
    names: Sequence[str],
) -> dict[str, _Spread]:
    """How far the dithered runs are from the reference, times :data:`SPREAD_FACTOR`."""
    errors = {
        name: [np.abs(outputs[name] - reference[name]) for outputs in dithered] for name in names
    }
    return {
        name: _Spread(
            *(
                SPREAD_FACTOR * largest([take(error) for error in several])
                for take in (np.max, np.mean)
            )
        )
        for name, several in errors.items()
    }


def _bounds(
    name: str, reference: NDArray[Any], scale: float, tolerance: Tolerance, spread: _Spread
) -> tuple[float, float, float]:
    """Scale, tolerance of the largest and of the mean error."""
    if name == "top_probabilities":
        bound = tolerance.probabilities(scale)
        return scale, _at_most_1(bound + spread.largest), _at_most_1(bound / 6 + spread.mean)
    own = float(np.abs(reference).max())
    return own, tolerance.logits(own) + spread.largest, own * tolerance.relative_mean + spread.mean


def _at_most_1(bound: float) -> float:
    return 1.0 if bound > 1 else bound  # NaN stays


def _output(name: str, highest: Any, mean: Any, bounds: tuple[float, float, float]) -> OutputRecord:
    scale, tolerance, mean_tolerance = bounds
    max_error, mean_error = (
        finite_or(None, getattr(result, f"{stat}_absdiff", None))
        for result, stat in ((highest, "max"), (mean, "mean"))
    )
    # Polygraphy compares too, but is content with a bound that is NaN.
    is_close = is_within(max_error, tolerance) and is_within(mean_error, mean_tolerance)
    return OutputRecord(
        name=name,
        max_error=max_error,
        mean_error=mean_error,
        scale=finite_or(0.0, scale),
        tolerance=finite_or(0.0, tolerance),
        mean_tolerance=finite_or(0.0, mean_tolerance),
        passed=is_close and bool(highest) and bool(mean),
    )


def _worst_cache(outputs: Sequence[OutputRecord]) -> Iterator[OutputRecord]:
    """All outputs, but of the cache only the tensor that used most of what is allowed."""
    cache = [record for record in outputs if record.name.startswith("present.")]
    yield from (record for record in outputs if record not in cache)
    if cache:
        yield max(
            cache,
            key=lambda record: (
                not record.passed,
                (record.max_error or 0.0) / max(record.tolerance, 1e-30),
            ),
        )


def _compare_ids(
    reference: Feed, found: Feed, scale: float, tolerance: Tolerance, spreads: Mapping[str, _Spread]
) -> Iterator[IdsRecord]:
    """The most probable id of every row or slot."""
    if "top_ids" in reference:
        candidates, values = reference["top_ids"], reference["top_probabilities"]
        own, other = candidates[..., 0], found["top_ids"][..., 0]
        # Where the target's id is none of the reference's candidates, the last of them says how
        # improbable it is at least.
        is_it = candidates == other[..., None]
        theirs = np.where(is_it.any(-1), (values * is_it).sum(-1), values[..., -1])
        yield _ids_record(
            "top_ids",
            own,
            other,
            values[..., 0] - theirs,
            2 * (tolerance.probabilities(scale) + spreads["top_probabilities"].largest),
        )
    if "greedy_ids" not in reference:
        return
    own, other, logits = reference["greedy_ids"], found["greedy_ids"], reference["logits"]
    exists = (other >= 0) & (other < logits.shape[-1])
    theirs = np.take_along_axis(logits, np.where(exists, other, 0)[..., None], -1)[..., 0]
    preference = np.where(exists, logits.max(-1) - theirs, np.inf)
    yield _ids_record(
        "greedy_ids",
        own,
        other,
        preference,
        tolerance.near_tie(float(np.abs(logits).max())) + 2 * spreads["logits"].largest,
    )


def _ids_record(
    name: str, own: Ids, other: Ids, preference: NDArray[Any], tolerance: float
) -> IdsRecord:
    differs = own != other
    most = float(preference[differs].max()) if differs.any() else 0.0
    return IdsRecord(
        name=name,
        num_compared=own.size,
        num_equal=int((~differs).sum()),
        tolerance=finite_or(0.0, tolerance),
        largest_preference=finite_or(None, most) if differs.any() else None,
        passed=is_within(most, tolerance),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs every step to stdout, which is for data here; the figures are taken from its
    results.
    """
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
