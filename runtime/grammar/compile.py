"""Compiles grammars within limits, each once."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from trimode.errors import UsageError
from trimode.runtime.grammar.library import load_llguidance
from trimode.runtime.grammar.source import grammar_source
from trimode.runtime.grammar.spec import StructuredOutputs
from trimode.runtime.grammar.state import GrammarState
from trimode.runtime.grammar.vocabulary import Vocabulary

MOST_SECONDS = 5.0
"""Most seconds for one grammar.

The library cannot be interrupted; its own limits end it before long.
"""
MOST_KEPT = 32
LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""Limits of the library: work and memory for a grammar, and for one token of it."""
_POSITION = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


class Grammar:
    """Holds a compiled grammar, from which any number of texts begin.

    Args:
        matcher: Matcher of the library, at its beginning.
        vocabulary: Tokens of the model.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def start(self, ends: frozenset[int], end_think: int | None = None) -> GrammarState:
        """Begin a text.

        Args:
            ends: Tokens that end it.
            end_think: Token after which it begins; None = at once.
        """
        return GrammarState(self._matcher.deep_copy(), self._vocabulary, ends, end_think)


@dataclass(frozen=True, kw_only=True)
class CompiledOutputs(StructuredOutputs):
    """Holds what an answer has to follow, compiled.

    Attributes:
        compiled: Grammar in the form that answers begin from.
    """

    compiled: Grammar


class GrammarCompiler:
    """Compiles for one vocabulary, and keeps the last grammars.

    For any thread.

    Args:
        vocabulary: Tokens of the model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._limits = load_llguidance().LLParserLimits(**LIMITS)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: StructuredOutputs) -> CompiledOutputs:
        """Compile a grammar, or find it among those kept.

        Args:
            spec: Outputs as read by ``read_structured_outputs``.

        Raises:
            UsageError: the grammar is wrong, cannot be written by any answer, or is too complex.
        """
        if (found := self.find(spec)) is not None:
            return found
        source = grammar_source(spec)
        grammar = self._compile(source)
        with self._lock:
            self._kept[source] = grammar
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return CompiledOutputs(**vars(spec), compiled=grammar)

    def find(self, spec: StructuredOutputs) -> CompiledOutputs | None:
        """Find a grammar among those kept; quick."""
        source = grammar_source(spec)
        with self._lock:
            if (grammar := self._kept.get(source)) is None:
                return None
            self._kept.move_to_end(source)
        return CompiledOutputs(**vars(spec), compiled=grammar)

    def _compile(self, source: str) -> Grammar:
        start = time.monotonic()
        matcher = load_llguidance().LLMatcher(
            self._vocabulary.library, source, log_level=0, limits=self._limits
        )
        if matcher.is_error():
            raise _refused(matcher.get_error())
        grammar = Grammar(matcher, self._vocabulary)
        _try_beginning(grammar)
        if (seconds := time.monotonic() - start) > MOST_SECONDS:
            raise _refused(f"one that takes {seconds:.1f} s to compile")
        return grammar


def _try_beginning(grammar: Grammar) -> None:
    """Find out here what would fail at the first token.

    That is a grammar without a text, or one that is too wide.
    """
    state = grammar.start(frozenset())
    if not state.is_over and state.forced() is None:
        state.mask()


def _refused(message: str) -> UsageError:
    lines = [line.strip() for line in message.splitlines()]
    wrong = next((line for line in lines if line.startswith("error:")), None)
    reason = _POSITION.sub("", lines[0] if lines else "no reason")
    shown = f"{reason} {wrong.removeprefix('error: ')}" if wrong else reason
    return UsageError(
        f"structured_outputs: expected a grammar that compiles, found: {shown[:240]}",
        "see docs/guides/structured-output.md for what is supported",
    )
