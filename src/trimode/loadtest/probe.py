"""Finds out, before a run, which optional fields a server takes."""

from __future__ import annotations

from dataclasses import replace

import httpx

from trimode.errors import EngineError
from trimode.loadtest.bodies import OPTIONAL, Composer
from trimode.loadtest.client import Exchange
from trimode.loadtest.play import Player
from trimode.loadtest.questions import Question

_REFUSED = (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY)


async def probe(player: Player, question: Question) -> Composer:
    """Send a request, leaving out refused optional fields, until it is answered.

    Returns:
        The player's composer, which leaves these fields out.

    Raises:
        EngineError: the request fails without them, too.
    """
    composer = player.composer
    first = done = await _ask(player, question)
    for name in OPTIONAL:
        if done.status not in _REFUSED:
            break
        composer = replace(composer, left_out=composer.left_out | {name})
        done = await _ask(replace(player, composer=composer), question)
    if done.error:
        mode = "" if composer.mode is None else f" in mode {composer.mode}"
        raise EngineError(
            f"expected an answer{mode} from {player.base}, found: {first.error}",
            "check the server, the model and the prompts; `modes` is for servers of trimode",
        )
    return composer


async def _ask(player: Player, question: Question) -> Exchange:
    return await player.ask(question, question.turns[0] if question.turns else ())
