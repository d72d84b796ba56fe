"""Holds what routes share: engine, tokenizer, and the server's rules."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimode.formats.contract import Mode
from trimode.runtime.engine.handle import Handle
from trimode.runtime.grammar.spec import read_structured_outputs
from trimode.runtime.service import Engine
from trimode.runtime.text.codec import TextCodec
from trimode.runtime.text.stream import TextStream
from trimode.server.auth import ApiKeys
from trimode.server.errors import ApiError
from trimode.server.lifecycle import Lifecycle
from trimode.server.limits import Limits
from trimode.server.observers import Observer
from trimode.server.outputs import ChoiceText, OutputProcessor
from trimode.server.processors import default_processors
from trimode.server.protocol.base import Sampling
from trimode.server.reply import Asked, Bell, Reply

_QUICK = 4096
"""Characters that are encoded on the event loop; more go to a thread."""

_FEW = 8
"""Texts that are submitted on the event loop."""

MakeProcessors = Callable[[Sampling, str], Sequence[OutputProcessor]]
"""Makes the steps from text to answer, for a request and its rendered prompt."""


@dataclass
class Service:
    """Holds an engine and how it is served.

    Attributes:
        engine: Engine that answers.
        model_name: Name that the bundle is served under.
        default_mode: Mode of requests that name none.
        limits: Bounds of requests.
        keys: API keys.
        processors: Function that makes the steps from text to answer.
        observers: Listeners that are told of each ended text and each refusal.
        lifecycle: Requests at work.
        created: Unix time of the start.
    """

    engine: Engine
    model_name: str
    default_mode: Mode = "auto"
    limits: Limits = field(default_factory=Limits)
    keys: ApiKeys = field(default_factory=ApiKeys)
    processors: MakeProcessors = default_processors
    observers: tuple[Observer, ...] = ()
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template of the bundle."""
        return self.engine.model.codec

    def check_model(self, name: str | None) -> None:
        """Raise :class:`ApiError` 404 for another model's name."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"expected the model {self.model_name!r}, found {name[:100]!r}",
                param="model",
                code="model_not_found",
            )

    async def submit(
        self, asked: Asked, prompts: Sequence[list[int]], request: Sampling, choices: dict[str, Any]
    ) -> Reply:
        """Ask the engine for the texts of a request.

        Args:
            asked: Facts of the request, for observers.
            prompts: Token ids of each prompt.
            request: Request, for its processors.
            choices: Keywords of :meth:`Engine.submit`.

        Raises:
            UsageError: the engine does not take a value.
            QueueFullError: as many requests wait as may; nothing was submitted then.
        """
        bell = Bell()
        if request.stream:  # an answer in one piece is told at its end alone
            choices = choices | {"on_piece": bell.ring}
        is_slow = "structured_outputs" in choices  # it is compiled
        if is_slow or len(prompts) * (request.n or 1) > _FEW:
            texts = await asyncio.to_thread(self._texts, asked, prompts, request, choices)
        else:
            texts = self._texts(asked, prompts, request, choices)
        return Reply(asked, texts, bell)

    def _texts(
        self, asked: Asked, prompts: Sequence[list[int]], request: Sampling, choices: dict[str, Any]
    ) -> list[ChoiceText]:
        if (follows := choices.get("structured_outputs")) is not None:
            # A wrong grammar is refused here, before an answer begins; the engine finds it compiled
            self.engine.model.grammars.compile(read_structured_outputs(follows))
        stops, fewest = choices.get("stop") or (), choices.get("min_new_tokens") or 0
        handles: list[Handle] = []
        try:
            for prompt in prompts:
                handles += self.engine.submit(prompt, **choices).choices
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return [
            ChoiceText(
                index,
                handle,
                TextStream(self.codec, stops, fewest),
                self.processors(request, asked.prompt),
            )
            for index, handle in enumerate(handles)
        ]


async def run_aside(function: Callable[[], Any], size: int) -> Any:
    """Run something here where it is quick, else in a thread.

    Args:
        function: Function to run.
        size: Characters that it goes over.
    """
    return function() if size <= _QUICK else await asyncio.to_thread(function)
