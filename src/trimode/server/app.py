"""Puts the application together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from trimode.errors import TrimodeError
from trimode.server.errors import ApiError, answer_http_error, api_error
from trimode.server.gate import Gate
from trimode.server.observers import tell_rejected
from trimode.server.openapi import describe
from trimode.server.routes.state import OPEN_PATHS, state_router
from trimode.server.routes.texts import texts_router
from trimode.server.routes.tokens import tokens_router
from trimode.server.service import Service


def create_app(
    service: Service,
    *,
    routers: Iterable[APIRouter] = (),
    open_paths: Iterable[str] = (),
    middleware: Iterable[Callable[[ASGIApp], ASGIApp]] = (),
) -> FastAPI:
    """Make the application.

    Args:
        service: Engine, and how it is served.
        routers: Further routes.
        open_paths: Paths of these that need no API key.
        middleware: Classes of ASGI middleware, the outermost last; they see requests first.
    """
    app = FastAPI(title="trimode", docs_url=None, redoc_url=None)
    for router in (state_router(service), texts_router(service), tokens_router(service), *routers):
        app.include_router(router)

    async def refuse(_: Request, error: Exception) -> Response:
        found = api_error(error)
        tell_rejected(service.observers, found.code)
        return found.response()

    for error in (ApiError, TrimodeError):
        app.add_exception_handler(error, refuse)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]  # as FastAPI documents it
    app.add_middleware(
        Gate,
        keys=service.keys,
        open_paths=OPEN_PATHS | {*open_paths},
        observers=service.observers,
    )
    for one in middleware:
        app.add_middleware(one)
    return app
