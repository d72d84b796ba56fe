"""The OpenAPI schema, against what the server does: schemathesis makes up requests from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.service import Service

EXAMPLES = int(os.environ.get("TRIMODE_SCHEMA_EXAMPLES", "15"))
"""Requests made up for each path; a run by hand takes more."""


@pytest.fixture(scope="module")
def schema(demo_model: TriModeModel) -> Iterator[Any]:
    with (
        Engine(demo_model, max_rows=4, max_queue=4096) as engine,
        serving(Service(engine, "demo")) as address,
    ):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/version", "GET"),
]
MADE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_every_operation_is_in_the_list(schema: Any) -> None:
    found = {(one.ok().path, one.ok().method.upper()) for one in schema.get_all_operations()}
    assert found == set(OPERATIONS)


def hurry(body: dict[str, Any]) -> None:
    """Ask for few tokens, and of the model that there is."""
    if isinstance(body.get("max_tokens", 0), int):
        body["max_tokens"] = min(body.get("max_tokens", 4), 4)
    if isinstance(body.get("model"), str):
        body["model"] = "demo"


@pytest.mark.parametrize("kind", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_breaks_the_schema(
    schema: Any, path: str, method: str, kind: GenerationMode
) -> None:
    """Statuses, headers and bodies are those declared; what the schema forbids is refused.

    A body that it allows may still be refused for what it means, such as another model's name.
    """
    operation = schema[path][method]
    if kind is GenerationMode.NEGATIVE and method == "GET":
        kind = GenerationMode.POSITIVE  # there is nothing in it that could be wrong

    @MADE
    @given(case=operation.as_strategy(generation_mode=kind))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and path.startswith("/v1/"):
            hurry(case.body)
        answer = case.call(timeout=30)
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])
        assert answer.status_code < 500

    run()
