"""Turns texts into token ids, and back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from trimode.server.bodies import body_schema, read_model
from trimode.server.conversation import plain_conversation, render
from trimode.server.errors import ApiError
from trimode.server.protocol.errors import OF_BODIES, error_responses
from trimode.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from trimode.server.service import Service, run_aside


def tokens_router(service: Service) -> APIRouter:
    """Make the routes of the tokenizer."""
    router = APIRouter(tags=["tokens"])

    @router.post(
        "/tokenize",
        openapi_extra=body_schema(TokenizeRequest),
        responses=error_responses(*OF_BODIES),
    )
    async def tokenize(request: Request) -> dict[str, Any]:
        """Encode a text, or a conversation by the chat template."""
        asked = await read_model(request, TokenizeRequest, service.limits)
        service.check_model(asked.model)
        ids = await _encode(service, asked)
        strings = (
            [service.codec.token_text(one) for one in ids] if asked.return_token_strs else None
        )
        return {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": service.engine.model.model.max_length,
            "token_strs": strings,
        }

    @router.post(
        "/detokenize",
        openapi_extra=body_schema(DetokenizeRequest),
        responses=error_responses(*OF_BODIES),
    )
    async def detokenize(request: Request) -> dict[str, Any]:
        """Decode token ids."""
        asked = await read_model(request, DetokenizeRequest, service.limits)
        service.check_model(asked.model)
        size = service.engine.model.model.vocab_size
        if wrong := [token for token in asked.tokens if token >= size]:
            raise ApiError(
                400,
                f"tokens: expected ids from 0 to {size - 1}, found {wrong[0]}",
                param="tokens",
                code="invalid_value",
            )
        return {
            "prompt": await run_aside(lambda: service.codec.decode(asked.tokens), len(asked.tokens))
        }

    return router


async def _encode(service: Service, asked: TokenizeRequest) -> list[int]:
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(
            400, "expected prompt or messages, found both or none of them", code="invalid_value"
        )
    if asked.prompt is not None:
        prompt = asked.prompt
        found: list[int] = await run_aside(lambda: service.codec.encode(prompt), len(prompt))
        return found
    conversation = plain_conversation(asked, service.limits)
    _, ids = await run_aside(lambda: render(service.codec, conversation), conversation.size)
    return list(ids)
