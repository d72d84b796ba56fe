"""Holds a request to an engine, from submission to its end."""

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
    """Holds what an engine was asked for, checked.

    Attributes:
        handle: Handle that its tokens go to.
        ids: Token ids of the prompt.
        mode: Mode of the text.
        options: Checked options.
        namespace: Name within which its computed prefixes are shared.
        fair_key: Key that it counts for where an engine is fair.
        priority: Priority; larger comes first.
        deadline: Time on the engine's clock at which it fails; None = never.
        system_length: Tokens of the prompt that are the system prompt.
        is_kept: Whether what it has computed is kept for others once it has ended.
        number: Number in the order of arrival.
        attempts: Times that it could not be given a row.
        observer: Function told of each turn of its algorithm, on the engine's thread; None =
            nobody is.
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
        """Most tokens of prompt and answer together."""
        return len(self.ids) + self.options.max_new_tokens

    @property
    def ends(self) -> list[tuple[int, Kind]]:
        """Ends of the kinds of the text's tokens."""
        return [(self.system_length, Kind.SYSTEM), (len(self.ids), Kind.USER)]

    @property
    def is_pinned(self) -> bool:
        """Whether load may not change how it is decoded.

        It may not where another mode than ``auto`` was asked for. Nor may it where there is a seed,
        of which other draws would come.
        """
        return self.mode != "auto" or self.options.sampling.seed is not None
