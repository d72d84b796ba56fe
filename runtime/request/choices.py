"""Turns the keywords of a call into checked decoding options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.runtime.decode.algorithms import MODES
from trimode.runtime.decode.options import (
    DEFAULT_MARGIN,
    DEFAULT_QUADRATIC_LENGTH,
    DEFAULT_THRESHOLDS,
    DecodeOptions,
    check_options,
    default_block_length,
    make_options,
    read_options,
)
from trimode.runtime.grammar.library import load_llguidance
from trimode.runtime.request.parts import BundleParts
from trimode.runtime.request.step_costs import StepCostTable
from trimode.runtime.sessions.base import Session

END_THINK = "</think>"


class ChoiceReader:
    """Reads the options of a call for one model.

    Args:
        session: Loaded graphs.
        parts: Bundle, with the parts that some options need.
        costs: Step costs of mode ``auto``.
    """

    def __init__(self, session: Session, parts: BundleParts, costs: StepCostTable) -> None:
        self._manifest = parts.bundle.manifest
        self._model = self._manifest.model
        self._session, self._parts, self._costs = session, parts, costs

    def read(self, mode: Mode, options: dict[str, Any], batch: int = 1) -> DecodeOptions:
        """Check options, and fill in what they leave open.

        Args:
            mode: Name of the mode.
            options: Keywords of the call.
            batch: Number of texts that run side by side.

        Raises:
            UsageError: an unknown mode or keyword, or a value out of its range.
            DependencyError: an answer has to follow a grammar, and llguidance is not installed.
        """
        options = read_options(options)
        if options.get("structured_outputs") is not None:
            load_llguidance()
        _check_mode(mode)
        defaults = {
            "threshold": DEFAULT_THRESHOLDS[mode],
            "block_length": default_block_length(mode, self._model),
        }
        chosen = make_options(
            **{**defaults, **self._for_sampler(mode, options), **self._with_end_think(options)}
        )
        check_options(chosen, self._model, mode)
        if mode == "auto" and chosen.costs is None and (timings := self._parts.timings) is not None:
            chosen = replace(chosen, costs=self._costs.find(timings, chosen, batch))
        self._check_graphs(mode, chosen)
        return chosen

    def _check_graphs(self, mode: Mode, chosen: DecodeOptions) -> None:
        if mode == "quadratic_spec":
            self._check_quadratic(chosen.block_length)
        elif mode != "ar" and chosen.costs is None:
            self._session.check_block_length(chosen.block_length)

    def _for_sampler(self, mode: Mode, options: dict[str, Any]) -> dict[str, Any]:
        """Fill in what the sampler needs and the options leave open."""
        # A sampler in another mode is refused with the other options
        sampler = options.get("sampler") if mode == "diffusion" else None
        if sampler == "learned":
            record = self._parts.sampler_record
            return {"threshold": record.threshold, "scorer": self._parts.scorer}
        if sampler in ("schedule", "leftmost") and "threshold" in options:
            raise UsageError(
                f"expected no threshold with the sampler {sampler}, found {options['threshold']}",
                "leave it out: nothing is compared",
            )
        return {"threshold": DEFAULT_MARGIN} if sampler == "margin" else {}

    def _with_end_think(self, options: dict[str, Any]) -> dict[str, Any]:
        """Add the tokenizer's ``</think>`` where it is needed and not named."""
        asked = options.get("structured_outputs")
        is_needed = options.get("max_thinking_tokens") is not None or (
            asked is not None and asked.after_thinking
        )
        if not is_needed or options.get("end_think_token_id") is not None:
            return options
        return {**options, "end_think_token_id": self._parts.codec.token_id(END_THINK)}

    def _check_quadratic(self, block_length: int) -> None:
        if "quadratic" not in self._manifest.contracts:
            raise UsageError(
                "expected a bundle with the graph of quadratic self-speculation, found one without",
                "build the bundle again: `trimode build CHECKPOINT -o BUNDLE --quadratic --force`",
            )
        most = self._model.max_quadratic_length
        if block_length > most:
            raise UsageError(
                "expected, for quadratic self-speculation, "
                f"a block length from 1 to {most}, found {block_length}",
                f"the reference takes {DEFAULT_QUADRATIC_LENGTH}; "
                "a text that may be longer (--max-length) allows up to 32",
            )
        self._session.check_block_length(block_length, ("draft", "quadratic"))


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(
            f"expected a mode among {', '.join(MODES)}, found {mode!r}",
            "see the README for what each mode does",
        )
