"""Guards all routes: names requests, checks keys, and answers errors."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimode.server.auth import ApiKeys
from trimode.server.errors import ApiError, api_error
from trimode.server.observers import Observer, tell_rejected

REQUEST_ID = "X-Request-Id"
_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
logger = logging.getLogger("trimode.server")


class Gate:
    """Lets requests through that have a valid key, with an id.

    A client's own ``X-Request-Id`` is kept where it is harmless to log. Routes find both in
    ``request.state``: ``request_id``, and ``key``, the digest of the API key or None; and
    ``received``, by ``time.perf_counter``.

    Args:
        app: Application behind it.
        keys: API keys.
        open_paths: Paths that need no key.
        observers: Listeners that are told of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        open_paths: frozenset[str],
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(headers)
        state["key"], state["received"] = None, time.perf_counter()
        send = _naming(send, request_id)
        try:
            if scope["path"] not in self._open_paths:
                state["key"] = self._keys.check(headers.get("authorization"))
        except ApiError as error:
            tell_rejected(self._observers, "unauthorized")
            await error.response()(scope, receive, send)
            return
        await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what nobody expected, too, as long as nothing has been sent."""
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            logger.exception("a request has failed: %s", scope["path"])
            if not has_begun:
                await api_error(error).response()(scope, receive, send)


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    return given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex


def _naming(send: Send, request_id: str) -> Send:
    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[REQUEST_ID] = request_id
        await send(message)

    return named
