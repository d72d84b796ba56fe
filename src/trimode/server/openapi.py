"""Describes the interface: FastAPI's schema, with the bodies that routes read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import trimode
from trimode.server.protocol.chat import ChatRequest
from trimode.server.protocol.completions import CompletionRequest
from trimode.server.protocol.errors import ErrorBody
from trimode.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def describe(app: FastAPI) -> dict[str, Any]:
    """Make the OpenAPI schema of an application, and keep it."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title="trimode", version=trimode.__version__, routes=app.routes, openapi_version="3.1.0"
        )
        kinds = [(kind, "validation") for kind in (*BODIES, ErrorBody)]
        _, made = models_json_schema(
            kinds,  # type: ignore[arg-type]  # a list of pairs
            ref_template="#/components/schemas/{model}",
        )
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        known.update(made["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
