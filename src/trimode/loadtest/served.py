"""Reads what a server tells about itself: models, version, counters, token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from trimode.errors import EngineError
from trimode.formats.load import ServedRecord, ServerRecord
from trimode.formats.texts import reason_of
from trimode.loadtest.client import Connections
from trimode.loadtest.options import Server
from trimode.loadtest.random_questions import WORDS

Counters = dict[str, float]
_DIGESTS = ("bundle_sha256", "bundle_digest", "digest")
_FORWARDS = "trimode:forwards_total"
_SPECULATION = "vllm:spec_decode_num_"
_CREATED = "_created"


async def describe(client: Connections, server: Server) -> ServerRecord:
    """Ask for the model's name and the version.

    Raises:
        EngineError: nothing answers at the address, or no model is listed and none was named.
    """
    models = await _models(client, server)
    version = await _json(client, server.base + "/version")
    fields = {name: str(value) for name, value in version.items() if _is_plain(value)}
    chosen = next((one for one in models if one.get("id") == server.model), None)
    if server.model is None:
        if not models:
            raise EngineError(
                f"expected a model in {server.base}/v1/models, found none",
                "name the model with `model`",
            )
        chosen = models[0]
    known = {**fields, **{k: str(v) for k, v in (chosen or {}).items() if _is_plain(v)}}
    digest = next((known[name] for name in _DIGESTS if known.get(name)), None)
    name = server.model or str((chosen or {}).get("id"))
    return ServerRecord(url=server.base, model=name, bundle_sha256=digest, version=fields)


async def counters(client: Connections, base: str) -> Counters:
    """Read the server's counters; empty if there are none.

    Sums and counts of histograms are among them.
    """
    try:
        response = await client.get(base + "/metrics")
        return dict(_samples(response.text)) if response.is_success else {}
    except (httpx.HTTPError, ValueError):
        return {}


async def ordinary_ids(client: Connections, server: ServerRecord) -> list[int]:
    """Ask for ids of ordinary tokens; empty without ``/tokenize``."""
    body = {"model": server.model, "prompt": " ".join(WORDS)}
    # vLLM would add its special tokens; not every server knows the field
    for fields in ({"add_special_tokens": False}, {}):
        try:
            response = await client.post(server.url + "/tokenize", {**body, **fields})
            ids = response.json()["tokens"] if response.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []
        if isinstance(ids, list) and all(isinstance(one, int) for one in ids):
            return sorted(set(ids))
    return []


def served_record(before: Counters, after: Counters) -> ServedRecord:
    """Compare two readings of the counters."""
    growth = {name: value - before.get(name, 0.0) for name, value in after.items()}
    growth = {name: value for name, value in growth.items() if value}
    total = {bare: _total(growth, bare) for bare in {name.partition("{")[0] for name in growth}}
    graphs = _by_label(growth, _FORWARDS, "graph")
    accepted = f"{_SPECULATION}accepted_tokens_total"
    per_step = _ratio(total, accepted, f"{_SPECULATION}drafts_total")
    rate = _ratio(total, accepted, f"{_SPECULATION}draft_tokens_total")
    return ServedRecord(
        hit_rate=_ratio(total, "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
        rows_per_forward=_ratio(total, "trimode:forward_rows_total", _FORWARDS),
        forward_share={graph: count / sum(graphs.values()) for graph, count in graphs.items()},
        mode_switches=_switches(after, total),
        spec_decode_acceptance_length=None if per_step is None else 1 + per_step,
        spec_decode_acceptance_rate=None if rate is None else 100 * rate,
        counters=growth,
    )


def _switches(after: Counters, total: Mapping[str, float]) -> int | None:
    """Count switches; None if the server has no such counter."""
    name = "trimode:mode_switches_total"
    is_told = any(one.startswith("trimode:") for one in after)
    return int(total.get(name, 0)) if is_told else None


async def _models(client: Connections, server: Server) -> list[dict[str, Any]]:
    address = server.base + "/v1/models"
    try:
        response = await client.get(address)
    except httpx.HTTPError as error:
        raise EngineError(
            f"expected a server at {server.base}, found: {reason_of(error)}",
            "start it, or check the address",
        ) from error
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise EngineError(
            f"expected {address} to take the key, found HTTP {response.status_code}",
            "pass `api_key`, or set OPENAI_API_KEY",
        )
    listed = _object(response.text).get("data") if response.is_success else None
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


async def _json(client: Connections, address: str) -> dict[str, Any]:
    try:
        response = await client.get(address)
    except httpx.HTTPError:
        return {}
    return _object(response.text) if response.is_success else {}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if _counts(family.type, sample):
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                yield (f"{sample.name}{{{labels}}}" if labels else sample.name), sample.value


def _counts(kind: str, sample: Sample) -> bool:
    """Whether a sample only grows, and is no part of a distribution."""
    is_part = sample.name.endswith(("_bucket", _CREATED))
    return kind in ("counter", "histogram", "summary") and not is_part


def _total(growth: Counters, bare: str) -> float:
    return sum(value for name, value in growth.items() if name.partition("{")[0] == bare)


def _by_label(growth: Counters, name: str, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in growth.items():
        bare, _, labels = key.partition("{")
        if bare == name and f'{label}="' in labels:
            which = labels.split(f'{label}="', 1)[1].split('"', 1)[0]
            found[which] = found.get(which, 0.0) + value
    return found


def _ratio(total: Mapping[str, float], part: str, whole: str) -> float | None:
    return total.get(part, 0.0) / total[whole] if total.get(whole) else None
