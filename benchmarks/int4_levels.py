"""What int8 inputs of int4 products change on the demo: answers by mode, and how far one row and a
block of rows differ.

    python -m benchmarks.int4_levels [--per-family 20]

Three int4 bundles (`rtn`) for ``cpu``: inputs in float32 (``exact``), in int8, and in int8 with a
quantized head. Held-out questions,
greedy, block 32. Each answer that `ar` wrote is run once more, token by token by `ar` and in blocks
of 32 by `verify`, and the logits of the same tokens are compared.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import held_out_questions, save
from benchmarks.quantization import DEMO, evaluate
from trimode.compiler.options import BuildOptions
from trimode.compiler.pipeline import build_bundle
from trimode.runtime import TriModeModel

FORMS: dict[str, dict[str, Any]] = {
    "inputs in float32": {"exact": True},
    "inputs in int8": {},
    "inputs in int8, int4 head": {"quantize_head": True},
}
BLOCK_LENGTH, MAX_NEW_TOKENS = 32, 192

Logits = NDArray[np.float32]


def compare_rows(model: TriModeModel, per_family: int) -> dict[str, Any]:
    """Over all tokens of the answers: the largest difference of a token's logits, and the distance
    of its two best ones in `ar`.
    """
    differences, gaps = [], []
    for alone, together in itertools.chain.from_iterable(
        _rows(model, prompt) for prompt in _prompts(model, per_family)
    ):
        differences.append(float(np.abs(alone - together).max()))
        second, first = np.partition(alone, -2)[-2:]
        gaps.append(float(first - second))
    return {
        "rows": len(differences),
        "median_difference": float(np.median(differences)),
        "largest_difference": max(differences),
        "least_gap": min(gaps),
        "gaps_below": {
            str(bound): sum(gap < bound for gap in gaps) for bound in (0.05, 0.1, 0.2, 0.5, 1.0)
        },
    }


def _prompts(model: TriModeModel, per_family: int) -> list[list[int]]:
    return [
        model.codec.encode_chat([{"role": "user", "content": question.prompt}])
        for question in held_out_questions(per_family)
    ]


def _rows(model: TriModeModel, prompt: list[int]) -> Iterator[tuple[Logits, Logits]]:
    """The logits behind each token of the answer: from a forward of that token alone, and from one
    of its block.
    """
    answer = model.ar_generate([prompt], max_new_tokens=MAX_NEW_TOKENS)[0][:, len(prompt) :]
    session, cache = model.session, model.session.new_cache()
    session.run("ar", cache, np.array([prompt]), 0)
    for start in range(0, answer.shape[1], BLOCK_LENGTH):
        block, past = answer[:, start : start + BLOCK_LENGTH], len(prompt) + start
        together = np.array(session.run("verify", cache, block, past)[2][0])
        for row in range(block.shape[1]):  # writes each slot again, with what AR would have written
            yield (
                np.array(session.run("ar", cache, block[:, row : row + 1], past + row)[1][0]),
                together[row],
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-family", type=int, default=20)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for form, chosen in FORMS.items():
            bundle = Path(name) / form
            options = BuildOptions(precision="int4", calibration="rtn", **chosen)
            build_bundle(DEMO, bundle, options)
            model = TriModeModel.from_pretrained(bundle)
            results[form] = {
                **evaluate(model, arguments.per_family),
                "one_row_and_many": compare_rows(model, arguments.per_family),
            }
    save("int4_levels", {"per_family": arguments.per_family, "results": results})
    for label, result in results.items():
        exact = ", ".join(
            f"{mode} {100 * row['exact_match']:.1f}%" for mode, row in result["modes"].items()
        )
        rows = result["one_row_and_many"]
        print(f"{label}: {exact}")
        print(
            f"    logits of one row and of many differ by {rows['median_difference']:.1e} in the "
            f"middle and {rows['largest_difference']:.1e} at most"
        )
        print(f"    the two best are {rows['least_gap']:.1e} apart at least; rows: {rows['rows']}")
        print(
            f"    self-speculation wrote the tokens of ar in "
            f"{100 * result['modes']['linear-spec']['same_tokens_as_ar']:.1f}% of the answers"
        )


if __name__ == "__main__":
    main()
