"""The OpenAPI schema, against what the server does: schemathesis makes up requests from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.service import Service

EXAMPLES = 20


@pytest.fixture(scope="module")
def schema(demo_model: TriModeModel) -> Iterator[Any]:
    with Engine(demo_model, max_rows=4) as engine, serving(Service(engine, "demo")) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


schema_of_server = schemathesis.pytest.from_fixture("schema")


@schema_of_server.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_of_the_schema_breaks_it(case: Any) -> None:
    body = case.body
    if isinstance(body, dict):
        body["max_tokens"] = min(body["max_tokens"], 4) if _is_whole(body.get("max_tokens")) else 4
    answer = case.call(timeout=30)
    case.validate_response(answer, excluded_checks=[schemathesis.checks.positive_data_acceptance])
    assert answer.status_code < 500
