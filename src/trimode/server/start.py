"""Opens a bundle, and serves it until a signal ends it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from trimode.errors import UsageError
from trimode.runtime.model import TriModeModel
from trimode.runtime.request.batches import check_batches
from trimode.runtime.service import Engine
from trimode.server.app import create_app
from trimode.server.auth import ApiKeys
from trimode.server.operations import operating
from trimode.server.options import ServeOptions
from trimode.server.run import serve
from trimode.server.service import Service
from trimode.server.watch.router import OPEN_PATHS, watch_router

DEFAULT_ROWS = 8


def serve_bundle(bundle: Path, options: ServeOptions) -> None:
    """Serve a bundle.

    Raises:
        UsageError: an option cannot be used, or the bundle has no tokenizer.
        BundleError: the bundle cannot be opened.
    """
    keys = ApiKeys.from_file(Path(options.api_key_file)) if options.api_key_file else ApiKeys()
    with (
        TriModeModel.from_pretrained(
            bundle,
            precision=options.precision,
            target=options.target,
            num_threads=options.threads,
        ) as model,
        open_engine(model, options, is_fair=len(keys) > 1) as engine,
        operating(engine, options.served_model_name or bundle.resolve().name, options) as watching,
    ):
        _check_text(model)
        service = Service(
            engine,
            options.served_model_name or bundle.resolve().name,
            default_mode=options.mode,
            limits=options.limits,
            keys=keys,
            processors=watching.processors,
            observers=watching.observers,
        )
        serve(
            create_app(
                service,
                middleware=watching.middleware,
                **further_routes(service, watching.routers, options),
            ),
            service.lifecycle,
            host=options.host,
            port=options.port,
            drain_timeout_s=options.drain_timeout,
        )


def open_engine(model: TriModeModel, options: ServeOptions, *, is_fair: bool) -> Engine:
    """Make the engine; keys take turns where there are several."""
    most = check_batches(model.session).max_batch
    rows = options.max_rows
    if rows is None:
        rows = DEFAULT_ROWS if most is None else min(DEFAULT_ROWS, most)
    return Engine(
        model,
        max_rows=rows,
        kv_bytes=options.kv_bytes,
        max_queue=options.max_queue,
        mode=options.mode,
        is_fair=is_fair,
    )


def further_routes(
    service: Service, routers: Sequence[APIRouter], options: ServeOptions
) -> dict[str, Any]:
    """Return keywords of :func:`create_app`: the routes and open paths.

    The page's routes are among them if it is asked for.
    """
    if not options.watch:
        return {"routers": routers}
    return {"routers": [*routers, watch_router(service)], "open_paths": OPEN_PATHS}


def _check_text(model: TriModeModel) -> None:
    """Load the tokenizer before the first request does."""
    if not model.codec.has_chat_template:
        raise UsageError(
            f"{model.bundle.path}: expected a chat template, found none",
            "put a chat_template.jinja beside tokenizer.json, and build again",
        )
