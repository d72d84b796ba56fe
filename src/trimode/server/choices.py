"""Translates requests for the engine, and checks them against this server."""

from __future__ import annotations

from typing import Any, cast

from trimode.formats.contract import Mode
from trimode.server.auth import salt_of
from trimode.server.errors import ApiError
from trimode.server.limits import Limits
from trimode.server.protocol.base import Sampling
from trimode.server.service import Service

_SAME_NAMES = (
    "min_p",
    "top_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "block_length",
    "threshold",
    "priority",
    "max_thinking_tokens",
)


def engine_choices(
    request: Sampling, service: Service, key: str | None, logprobs: int | None
) -> dict[str, Any]:
    """Make the keywords of :meth:`Engine.submit`.

    Args:
        request: Checked request.
        service: Server's engine and rules.
        key: Digest of the API key; None without keys.
        logprobs: Number of most probable tokens beside each one; None = no log-probabilities.

    Raises:
        ApiError: 400, the request asks for more than this server allows.
    """
    check_limits(request, service.limits)
    found = {name: getattr(request, name) for name in _SAME_NAMES}
    found |= {
        "mode": mode_of(request, service.default_mode),
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_k": max(0, request.top_k) if request.top_k is not None else None,
        "max_new_tokens": _most_tokens(request),
        "min_new_tokens": request.min_tokens,
        "stop": stops_of(request) or None,
        "n": request.n,
        "logprobs": logprobs,
        "eos_token_ids": _ends(request, service),
        "logit_bias": _biases(request),
        "cache_salt": salt_of(key, request.cache_salt or ""),
        "fair_key": key,
        "timeout_s": service.limits.request_timeout_s,
    }
    return given(**found)


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def mode_of(request: Sampling, default: Mode) -> Mode:
    """Return the mode that is asked for, or the default.

    Names may be written with a hyphen.
    """
    return cast("Mode", request.mode.replace("-", "_")) if request.mode else default


def stops_of(request: Sampling) -> list[str]:
    """Return the stop strings."""
    stop = request.stop
    return [stop] if isinstance(stop, str) else list(stop or ())


def check_limits(request: Sampling, limits: Limits) -> None:
    """Raise :class:`ApiError` 400 for a request over the limits."""
    stops = stops_of(request)
    check_most("stop", len(stops), limits.max_stop, "stop strings")
    longest = max(map(len, stops), default=0)
    check_most("stop", longest, limits.max_stop_characters, "characters of a stop string")
    check_most("n", request.n or 1, limits.max_n, "answers")
    check_most("logit_bias", len(request.logit_bias or ()), limits.max_biases, "biases")
    check_most("stop_token_ids", len(request.stop_token_ids or ()), limits.max_biases, "tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400,
            "expected stream_options together with stream, found them alone",
            param="stream_options",
            code="invalid_value",
        )


def check_most(param: str, found: int, most: int, what: str) -> None:
    """Raise :class:`ApiError` 400 for a number above a limit."""
    if found > most:
        raise ApiError(
            400,
            f"{param}: expected at most {most} {what}, found {found}",
            param=param,
            code="limit_exceeded",
        )


def _most_tokens(request: Sampling) -> int | None:
    newer = getattr(request, "max_completion_tokens", None)
    if newer is not None and request.max_tokens not in (None, newer):
        raise ApiError(
            400,
            "expected max_tokens or max_completion_tokens, found both and different",
            param="max_tokens",
            code="invalid_value",
        )
    return request.max_tokens if newer is None else newer


def _ends(request: Sampling, service: Service) -> tuple[int, ...] | None:
    """Tokens that end the text; None = the model's own."""
    own = () if request.ignore_eos else service.engine.model.model.eos_token_ids
    more = tuple(request.stop_token_ids or ())
    return (*own, *more) if request.ignore_eos or more else None


def _biases(request: Sampling) -> dict[int, float] | None:
    if not request.logit_bias:
        return None
    return {int(token): bias for token, bias in request.logit_bias.items()}
