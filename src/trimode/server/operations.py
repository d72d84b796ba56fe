"""Puts together what watches a server: metrics, log and traces."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.types import ASGIApp

import trimode
from trimode.errors import DependencyError
from trimode.runtime.service import Engine
from trimode.server.access_log import AccessLog, RequestLog, TextLog
from trimode.server.logs import LogFormat, logging_to
from trimode.server.metrics import Metrics
from trimode.server.observers import Observer
from trimode.server.options import ServeOptions
from trimode.server.outputs import OutputProcessor
from trimode.server.processors import default_processors
from trimode.server.protocol.base import Sampling
from trimode.server.routes.metrics import metrics_router


@dataclass(frozen=True)
class Operations:
    """Holds the parts of an application that watch it.

    Attributes:
        observers: Listeners that are told of texts and refusals.
        middleware: Layers around the application, the outermost last.
        routers: Further routes.
        processors: Function that makes the steps from text to answer.
    """

    observers: tuple[Observer, ...]
    middleware: tuple[Callable[[ASGIApp], ASGIApp], ...]
    routers: tuple[APIRouter, ...]
    processors: Callable[[Sampling, str], Sequence[OutputProcessor]]


@contextmanager
def operating(engine: Engine, model_name: str, options: ServeOptions) -> Iterator[Operations]:
    """Watch a server while the block runs.

    Raises:
        DependencyError: traces are asked for, and OpenTelemetry is not installed.
    """
    model = engine.model
    facts = {"target": model.target, "precision": model.bundle.precision}
    metrics = Metrics(engine.stats, model_name, model.model.max_length, facts)
    observers: list[Observer] = [metrics, RequestLog()]
    middleware: list[Callable[[ASGIApp], ASGIApp]] = [AccessLog]
    with ExitStack() as stack:
        if options.otlp_traces_endpoint is not None:
            tracer, layer = _tracing(stack, options.otlp_traces_endpoint)
            observers.append(tracer)
            middleware.insert(0, layer)
        log_format: LogFormat = "json" if options.log_format == "json" else "text"
        stack.enter_context(logging_to(None, log_format, with_texts=options.log_prompts))
        yield Operations(
            tuple(observers),
            tuple(middleware),
            (metrics_router(metrics),),
            logged_processors if options.log_prompts else default_processors,
        )


def logged_processors(request: Sampling, prompt: str) -> list[OutputProcessor]:
    """Make the usual steps, and one that logs prompt and answer."""
    asked = prompt or str(getattr(request, "prompt", ""))
    return [*default_processors(request, prompt), TextLog(asked)]


def _tracing(stack: ExitStack, endpoint: str) -> tuple[Observer, Any]:
    if importlib.util.find_spec("opentelemetry") is None:
        raise DependencyError(
            "expected opentelemetry for traces, found not installed", "pip install 'trimode[otel]'"
        )
    from trimode.server.tracing import TraceParent, tracing_to

    return stack.enter_context(tracing_to(endpoint, trimode.__version__)), TraceParent
