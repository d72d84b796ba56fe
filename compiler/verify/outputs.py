"""Compares what two runners return for the same inputs.

Polygraphy runs them and compares.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from trimode.calib.reference.torch_session import accepted_lengths
from trimode.compiler.verify.rounding import SPREAD_FACTOR
from trimode.compiler.verify.runners import Feed
from trimode.compiler.verify.tolerance import Tolerance
from trimode.formats.contract import GraphContract, GraphName
from trimode.formats.finite import finite_or, is_within, largest
from trimode.formats.verification import GraphParity, IdsRecord, OutputRecord, Subject
from trimode.runtime.sessions.base import Ids


class _Bounds(NamedTuple):
    """Holds what an output may differ by."""

    scale: float
    largest: float
    mean: float


def compare_outputs(
    subject: Subject,
    contract: GraphContract,
    runners: Sequence[Any],
    feed: Feed,
    scale: float,
    tolerance: Tolerance,
    spreading: Sequence[Any] = (),
) -> GraphParity:
    """Run both in their order and compare the other with the reference.

    Args:
        subject: Kind of the other.
        contract: Contract of the graph.
        runners: Two Polygraphy runners, in the order in which they run; one is named "reference".
        feed: Inputs by name.
        scale: Largest absolute logit of the reference.
        tolerance: Tolerance of the other.
        spreading: Runners that tell how far the reference is from itself.
    """
    at = [runner.name for runner in runners].index("reference")
    with _quiet():
        run, outputs_of, feed = _run_all(contract.graph_name, runners, spreading, feed)
        reference, found = outputs_of[at], outputs_of[1 - at]
        floats = [name for name, values in reference.items() if values.dtype == np.float32]
        spreads = _spreads(reference, outputs_of[len(runners) :], floats)
        bounds = {
            name: _bounds(name, reference[name], scale, tolerance, spreads[name]) for name in floats
        }
        outputs = _compare_floats(run, (1 - at, at), bounds)
    ids = list(_compare_ids(reference, found, scale, tolerance, spreads))
    codes = getattr(runners[at], "codes", None)
    accepted = _has_accepted_length(found, feed)
    return GraphParity(
        subject=subject,
        graph=contract.graph_name,
        positions=tuple(feed["past_length"].tolist()),
        rows=feed["input_ids"].shape[1],
        use_drafter=bool(feed["drafter_scale"]) if "drafter_scale" in feed else None,
        outputs=tuple(_worst_cache(outputs)),
        ids=tuple(ids),
        codes=codes,
        has_accepted_length=accepted,
        passed=all(record.passed for record in (*outputs, *ids))
        and accepted is not False
        and (codes is None or codes.passed),
    )


def _compare_floats(
    run: Any, pair: tuple[int, int], bounds: Mapping[str, _Bounds]
) -> list[OutputRecord]:
    """Hold the errors of each output to its bounds."""
    # Polygraphy is content when either tolerance holds. A relative one of 0 leaves it to the
    # absolute one.
    largest_errors, mean_errors = (
        SimpleCompareFunc(atol=atol, rtol=0, check_error_stat=stat, find_output_func=_only(bounds))
        for stat, atol in (
            ("max", {name: bound.largest for name, bound in bounds.items()}),
            ("mean", {name: bound.mean for name, bound in bounds.items()}),
        )
    )
    results = Comparator.compare_accuracy(
        run, comparisons=[pair], compare_func=[largest_errors, mean_errors]
    )
    (highest,), (mean,) = (next(iter(result.values())) for result in results)
    return [_output(name, highest[name], mean[name], bound) for name, bound in bounds.items()]


def _has_accepted_length(found: Feed, feed: Feed) -> bool | None:
    """Tell whether the accepted length follows from the ids.

    None where the graph gives none.
    """
    if "accepted_length" not in found:
        return None
    expected = accepted_lengths(found["greedy_ids"], feed["input_ids"])
    return bool((found["accepted_length"] == expected).all())


def _run_all(
    graph_name: GraphName, runners: Sequence[Any], spreading: Sequence[Any], feed: Feed
) -> tuple[Any, list[Feed], Feed]:
    """Run all on inputs that their outputs can be compared for.

    What ``quadratic`` returns for the slots behind an accepted length can be compared only where
    all have the same length. Where they do not, the draft is cut short. That may take more than one
    attempt, because the perturbed ones draw anew in each.

    Returns:
        Polygraphy's results; the outputs by name of all ``runners``, then of all ``spreading``; and
        the inputs that gave them.
    """
    outputs_of: list[Feed] = []
    for _ in range(feed["input_ids"].shape[1] + 1):
        if outputs_of:
            feed = {**feed, "input_ids": _until_any_parts(feed["input_ids"], outputs_of)}
        (run,) = Comparator.run(list(runners), data_loader=[feed], streaming=True)
        outputs_of = [OrderedDict(results[0].items()) for _, results in run]
        outputs_of += [runner.infer_impl(feed) for runner in spreading]
        if graph_name != "quadratic" or all(
            (outputs["accepted_length"] == outputs_of[0]["accepted_length"]).all()
            for outputs in outputs_of
        ):
            break
    return run, outputs_of, feed


def _until_any_parts(draft: Ids, outputs_of: Sequence[Feed]) -> Ids:
    """Cut the draft short where the first accepted length ends.

    A token that none expects goes behind it.
    """
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
    """Holds what is allowed beyond the tolerance, per error."""

    largest: float = 0.0
    mean: float = 0.0


def _spreads(
    reference: Mapping[str, NDArray[Any]],
    perturbed: Sequence[Mapping[str, NDArray[Any]]],
    names: Sequence[str],
) -> dict[str, _Spread]:
    """How far the perturbed runs are from the reference, times :data:`SPREAD_FACTOR`."""
    errors = {
        name: [np.abs(outputs[name] - reference[name]) for outputs in perturbed] for name in names
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
) -> _Bounds:
    """The bounds of an output."""
    if name == "top_probabilities":
        bound = tolerance.probabilities(scale)
        return _Bounds(
            scale, _at_most_1(bound + spread.largest), _at_most_1(bound / 6 + spread.mean)
        )
    own = float(np.abs(reference).max())
    return _Bounds(
        own, tolerance.logits(own) + spread.largest, own * tolerance.relative_mean + spread.mean
    )


def _at_most_1(bound: float) -> float:
    return 1.0 if bound > 1 else bound  # NaN stays


def _output(name: str, highest: Any, mean: Any, bounds: _Bounds) -> OutputRecord:
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
    """Yield all outputs, but only the worst of the cache.

    That is the tensor that used most of what is allowed.
    """
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
    """Keep Polygraphy from logging to stdout, which is for data here."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
