"""Answers conversations, and continues texts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from trimode.server.answers import ChatShape, CompletionShape, Envelope
from trimode.server.bodies import body_schema, read_model
from trimode.server.choices import check_most, engine_choices, given
from trimode.server.conversation import plain_conversation, render
from trimode.server.errors import ApiError
from trimode.server.protocol.answers import ChatCompletion, Completion, answer_response
from trimode.server.protocol.base import Sampling, StreamOptions
from trimode.server.protocol.chat import ChatRequest
from trimode.server.protocol.completions import CompletionRequest
from trimode.server.protocol.errors import OF_TEXTS, error_responses
from trimode.server.reasoning import Place, place_after
from trimode.server.reply import Asked, Reply
from trimode.server.service import Service, run_aside
from trimode.server.streaming import EventStream, Telling, answer_whole
from trimode.server.structured import structured_outputs_of


def texts_router(service: Service) -> APIRouter:
    """Make the routes that answer with texts."""
    router = APIRouter(tags=["texts"])

    @router.post(
        "/v1/chat/completions",
        openapi_extra=body_schema(ChatRequest),
        responses=answer_response(ChatCompletion) | error_responses(*OF_TEXTS),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read_model(request, ChatRequest, service.limits)
        with service.lifecycle.taking():
            reply = await _chat_reply(service, request, asked)
        shape = ChatShape(service, with_ids=bool(asked.return_token_ids))
        envelope = Envelope("chat.completion", "chatcmpl", service.model_name)
        return await _answer(
            request, asked, Telling(service, reply, shape, envelope, _options(asked))
        )

    @router.post(
        "/v1/completions",
        openapi_extra=body_schema(CompletionRequest),
        responses=answer_response(Completion) | error_responses(*OF_TEXTS),
    )
    async def completions(request: Request) -> Response:
        """Continue texts."""
        asked = await read_model(request, CompletionRequest, service.limits)
        with service.lifecycle.taking():
            reply = await _completion_reply(service, request, asked)
        shape = CompletionShape(service, with_ids=bool(asked.return_token_ids))
        envelope = Envelope("text_completion", "cmpl", service.model_name)
        return await _answer(
            request, asked, Telling(service, reply, shape, envelope, _options(asked))
        )

    return router


async def _answer(request: Request, asked: Sampling, telling: Telling) -> Response:
    return EventStream(telling) if asked.stream else await answer_whole(request, telling)


async def _chat_reply(service: Service, request: Request, asked: ChatRequest) -> Reply:
    service.check_model(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(
            400,
            "expected top_logprobs together with logprobs, found them alone",
            param="top_logprobs",
            code="invalid_value",
        )
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    choices = engine_choices(asked, service, request.state.key, logprobs)
    conversation = plain_conversation(asked, service.limits)
    rendered, ids = await run_aside(lambda: render(service.codec, conversation), conversation.size)
    is_thinking = place_after(rendered) is Place.THINKING
    if not is_thinking:  # there is nothing to end
        choices.pop("max_thinking_tokens", None)
    choices |= given(structured_outputs=structured_outputs_of(asked, is_thinking=is_thinking))
    facts = _asked(service, request, choices, rendered)
    return await service.submit(facts, [ids], asked, choices)


async def _completion_reply(service: Service, request: Request, asked: CompletionRequest) -> Reply:
    service.check_model(asked.model)
    prompts = prompts_of(asked)
    check_most("prompt", len(prompts), service.limits.max_prompts, "prompts")
    num_texts = len(prompts) * (asked.n or 1)
    check_most("n", num_texts, service.limits.max_texts, "texts in all")
    choices = engine_choices(asked, service, request.state.key, asked.logprobs)

    def encode() -> list[list[int]]:
        return [service.codec.encode(one) if isinstance(one, str) else one for one in prompts]

    ids = await run_aside(encode, sum(map(len, prompts)))
    choices |= given(structured_outputs=structured_outputs_of(asked, is_thinking=False))
    return await service.submit(_asked(service, request, choices), ids, asked, choices)


def prompts_of(asked: CompletionRequest) -> list[Any]:
    """Return a request's prompts, each a text or a list of ids."""
    prompt = asked.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _asked(service: Service, request: Request, choices: dict[str, Any], prompt: str = "") -> Asked:
    state = request.state
    return Asked(state.request_id, service.model_name, choices["mode"], state.received, prompt)


def _options(asked: Sampling) -> StreamOptions:
    return asked.stream_options or StreamOptions()
