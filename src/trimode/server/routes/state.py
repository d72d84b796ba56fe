"""Tells what is served, and how the server is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

import trimode
from trimode.formats.files import sha256_of
from trimode.formats.manifest import MANIFEST
from trimode.server.errors import ApiError
from trimode.server.protocol.errors import error_responses
from trimode.server.service import Service

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Paths that need no API key."""


def state_router(service: Service) -> APIRouter:
    """Make the routes of probes and lists."""
    router = APIRouter(tags=["state"])
    card = _card(service)

    @router.get("/health", responses=error_responses(503))
    async def health() -> Response:
        """Tell whether the engine can work.

        The answer is 200, or 503 after an error that it cannot survive.
        """
        error = service.engine.error
        return JSONResponse({"status": "ok"}) if error is None else _unavailable(error.message)

    @router.get("/ready", responses=error_responses(503))
    async def ready() -> Response:
        """Tell whether new requests are taken.

        The answer is 200, or 503 while the server drains.
        """
        if service.lifecycle.is_draining:
            return _unavailable("the server is shutting down")
        return await health()

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Tell the library's version."""
        return {"version": trimode.__version__}

    @router.get("/v1/models", responses=error_responses(401))
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}", responses=error_responses(401, 404))
    async def model(name: str) -> dict[str, Any]:
        """Describe the model that is served."""
        service.check_model(name)
        return card

    return router


def _unavailable(reason: str) -> Response:
    return ApiError(503, reason, code="unavailable").response()


def _card(service: Service) -> dict[str, Any]:
    model = service.engine.model
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "trimode",
        "max_model_len": model.model.max_length,
        "bundle_sha256": sha256_of(model.bundle.path / MANIFEST),
        "target": model.target,
        "precision": model.bundle.precision,
        "default_mode": service.default_mode,
    }
