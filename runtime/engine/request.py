"""A request to an engine, from its submission to the end of its text."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from trimode.formats.contract import Mode
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.stream import Observer
from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.prefix_cache import Kind


@dataclass(eq=False)
class Request:
    """What an engine was asked for, checked.

    Attributes:
        handle: Where tokens go.
        ids: Prompt.
        mode: Mode of the text.
        options: Checked options.
        namespace: What its computed prefixes are shared within.
        fair_key: Whom it counts for where an engine is fair.
        priority: Larger comes first.
        deadline: On the engine's clock; None = none.
        system_length: Tokens of the prompt that are the system prompt.
        is_kept: Whether what it has computed is kept for others once it has ended.
        number: Order of arrival.
        attempts: Times that it could not be given a row.
        observer: Told of each turn of its algorithm, on the engine's thread; None = nobody is.
    """

    handle: Handle
    ids: list[int]
    mode: Mode
    options: DecodeOptions
    namespace: Hashable = ("salt", "")
    fair_key: Hashable = None
    priority: int = 0
    deadline: float | None = None
    system_length: int = 0
    is_kept: bool = True
    number: int = 0
    attempts: int = 0
    observer: Observer | None = None

    def take_grammar(self, compiled: DecodeOptions) -> None:
        """Have the grammar that was compiled for options like its own."""
        self.options = replace(self.options, structured_outputs=compiled.structured_outputs)

    @property
    def end(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.ids) + self.options.max_new_tokens

    @property
    def ends(self) -> list[tuple[int, Kind]]:
        """Where the kinds of the text's tokens end."""
        return [(self.system_length, Kind.SYSTEM), (len(self.ids), Kind.USER)]

    @property
    def is_pinned(self) -> bool:
        """Whether load may not change how it is decoded: other draws would come of its seed."""
        return self.mode != "auto" or self.options.sampling.seed is not None
