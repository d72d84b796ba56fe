"""Implements ``trimode serve``."""

from __future__ import annotations

from trimode.cli.flags import SERVE_FLAGS, flags_in_errors
from trimode.cli.options import serve as options
from trimode.cli.options.shared import BundlePath, RunPrecision, RunTarget, Threads
from trimode.cli.parse import given, need, parse_mode


def serve(
    bundle: BundlePath,
    *,
    host: options.Host = None,
    port: options.Port = None,
    api_key_file: options.ApiKeyFile = None,
    served_model_name: options.ServedModelName = None,
    mode: options.Mode = None,
    precision: RunPrecision = None,
    target: RunTarget = None,
    threads: Threads = None,
    max_rows: options.MaxRows = None,
    max_queue: options.MaxQueue = None,
    kv_bytes: options.KvBytes = None,
    drain_timeout: options.DrainTimeout = None,
    log_format: options.LogFormat = None,
    log_prompts: options.LogPrompts = None,
    otlp_traces_endpoint: options.OtlpTracesEndpoint = None,
    watch: options.Watch = None,
    config: options.Config = None,
) -> None:
    """Serve a bundle over HTTP, in the words of OpenAI's API.

    SIGTERM lets running requests finish; a second one stops at once.
    """
    need("a server", "serve", "fastapi", "uvicorn", "prometheus_client")
    from trimode.server.options import read_options
    from trimode.server.start import serve_bundle

    chosen = given(
        host=host,
        port=port,
        api_key_file=None if api_key_file is None else str(api_key_file),
        served_model_name=served_model_name,
        mode=None if mode is None else parse_mode(mode),
        precision=precision,
        target=target,
        threads=threads,
        max_rows=max_rows,
        max_queue=max_queue,
        kv_bytes=kv_bytes,
        drain_timeout=drain_timeout,
        log_format=log_format,
        log_prompts=log_prompts,
        otlp_traces_endpoint=otlp_traces_endpoint,
        watch=watch,
    )
    with flags_in_errors(SERVE_FLAGS):
        serve_bundle(bundle, read_options(config, chosen))
