"""Serves the page that shows decodings, and the traces that it shows."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trimode.formats.trace import RunEnd, TraceRecord
from trimode.runtime.engine.handle import Handle
from trimode.runtime.measure.trace import TraceWriter, header_of
from trimode.server.bodies import body_schema, read_model
from trimode.server.choices import engine_choices
from trimode.server.errors import ApiError
from trimode.server.protocol.errors import OF_TEXTS, error_responses
from trimode.server.reply import Bell
from trimode.server.service import Service, run_aside
from trimode.server.watch.request import WatchRequest

_STATIC = Path(__file__).parent / "static"
_PAGES = {
    "/watch": ("watch.html", "text/html"),
    "/watch/watch.css": ("watch.css", "text/css"),
    "/watch/watch.js": ("watch.js", "text/javascript"),
    "/watch/icon.svg": ("icon.svg", "image/svg+xml"),
}
OPEN_PATHS = frozenset(_PAGES)
"""Paths that need no API key: they hold nothing of the model."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_NEWEST = 20
"""Mode switches that the page is told."""


class Traces:
    """Gathers the lines of a trace for an event loop.

    Any thread may add lines.

    Args:
        bell: Bell that rings as lines come.
    """

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self._records: deque[TraceRecord] = deque()

    def put(self, record: TraceRecord) -> None:
        """Take a line."""
        self._records.append(record)
        self.bell.ring()

    def take(self) -> list[TraceRecord]:
        """Return the lines that nobody has taken."""
        return [self._records.popleft() for _ in range(len(self._records))]


def watch_router(service: Service) -> APIRouter:
    """Make the routes of the page."""
    router = APIRouter(tags=["watch"])
    for path, (name, media_type) in _PAGES.items():
        router.add_api_route(path, _page(name, media_type), include_in_schema=False)

    @router.get("/watch/engine", responses=error_responses(401))
    async def engine() -> Response:
        """Tell what the engine is doing."""
        return JSONResponse(_state(service))

    @router.post(
        "/watch/trace",
        openapi_extra=body_schema(WatchRequest),
        responses=error_responses(*OF_TEXTS),
    )
    async def trace(request: Request) -> Response:
        """Decode a text, and tell of each forward as it happens."""
        asked = await read_model(request, WatchRequest, service.limits)
        handle, traces = await _begin(service, request, asked)
        events = _events(service, handle, traces)
        return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM)

    return router


def _page(name: str, media_type: str) -> Any:
    content = (_STATIC / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page


async def _begin(service: Service, request: Request, asked: WatchRequest) -> tuple[Handle, Traces]:
    """Submit a request with a trace."""
    service.lifecycle.check_open()
    service.check_model(asked.model)
    if (asked.n or 1) > 1:
        raise ApiError(400, "expected one text a trace, found n above 1", param="n")
    choices = engine_choices(asked, service, request.state.key, None)
    if not asked.reuse:
        choices["cache_salt"] = None
    ids = await run_aside(lambda: _encode(service, asked.prompt), len(asked.prompt))
    model, traces = service.engine.model, Traces(Bell())
    header = header_of(model.bundle.manifest, model.bundle.precision, model.target)
    writer = TraceWriter(header, service.codec, traces.put)
    return service.engine.submit(ids, trace=writer, **choices), traces


def _encode(service: Service, prompt: str) -> list[int]:
    return service.codec.encode_messages([{"role": "user", "content": prompt}])[1]


async def _events(service: Service, handle: Handle, traces: Traces) -> AsyncIterator[bytes]:
    """Yield a trace's lines as server-sent events until its run ends."""
    with service.lifecycle.answering((handle,)):
        is_over = False
        while not is_over:
            has_rung = await traces.bell.wait(service.limits.ping_s)
            for record in traces.take():
                is_over = is_over or isinstance(record, RunEnd)
                yield b"data: " + record.line().encode() + b"\n\n"
            if not has_rung:
                yield b": ping\n\n"


def _state(service: Service) -> dict[str, Any]:
    stats = asdict(service.engine.stats())
    stats["mode_switches"] = stats["mode_switches"][-_NEWEST:]
    model = service.engine.model
    has_quadratic = "quadratic" in model.bundle.manifest.contracts
    modes = ["ar", "diffusion", "linear_spec", *["quadratic_spec"] * has_quadratic, "auto"]
    return {
        "model": service.model_name,
        "target": model.target,
        "precision": model.bundle.precision,
        "modes": modes,
        "block_length": model.model.block_size,
        "max_length": model.model.max_length,
        **stats,
    }
