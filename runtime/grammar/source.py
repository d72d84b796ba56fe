"""Writes what a caller asks for as a grammar of llguidance.

All kinds become Lark rules, because these can carry the option ``no_forcing``. With it the library
never looks ahead, which for a hostile grammar (``a{1000000}``) takes seconds in one call.
"""

from __future__ import annotations

import json
import re

from trimode.errors import UsageError
from trimode.formats.texts import reason_of
from trimode.runtime.grammar.library import load_llguidance
from trimode.runtime.grammar.spec import StructuredOutputs

_NO_FORCING = '%llguidance {"no_forcing": true}'
_ANY_OBJECT = '{"type":"object"}'
_OPTIONS = re.compile(r"^\s*%llguidance", re.MULTILINE)
_WHITESPACE = r" ?|\n {0,32}"
"""Bounded: a model that likes blanks would write them without end."""


def grammar_source(spec: StructuredOutputs) -> str:
    """Write a grammar in llguidance's form.

    Args:
        spec: Outputs as read by ``read_structured_outputs``.

    Raises:
        UsageError: the grammar sets options of the library, or is no GBNF.
        DependencyError: llguidance is not installed.
    """
    # The last line of options counts
    lark = f"{_lark(spec)}\n{_NO_FORCING}\n"
    return json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)


def _lark(spec: StructuredOutputs) -> str:
    if spec.json_object:
        return f"start: %json {_with_whitespace(_ANY_OBJECT, spec)}"
    if spec.json is not None:
        return f"start: %json {_with_whitespace(str(spec.json), spec)}"
    if spec.regex is not None:
        return f"start: /{load_llguidance().regex_to_lark(spec.regex, '')}/"
    if spec.choice is not None:
        return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in spec.choice)
    return _user_lark(str(spec.grammar))


def _with_whitespace(schema: str, spec: StructuredOutputs) -> str:
    """Return the schema with the library's options, which are ours alone."""
    options = (
        {"whitespace_flexible": False}
        if spec.disable_any_whitespace
        else {"whitespace_pattern": spec.whitespace_pattern or _WHITESPACE}
    )
    read = json.loads(schema)
    if isinstance(read, bool):
        read = {} if read else {"enum": []}
    return json.dumps({**read, "x-guidance": options}, ensure_ascii=False)


def _user_lark(grammar: str) -> str:
    if _OPTIONS.search(grammar):
        raise UsageError(
            "structured_outputs grammar: expected rules alone, found %llguidance",
            "leave out the options of the library",
        )
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the converter raises what it likes
        raise UsageError(
            f"structured_outputs grammar: expected GBNF, found: {reason_of(error)[:200]}",
            "check the rule, or write it in Lark's form: start: ...",
        ) from error
