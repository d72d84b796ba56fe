from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from serving import serving

from trimode import Engine, TriModeModel
from trimode.server.metrics import Metrics
from trimode.server.routes.metrics import metrics_router
from trimode.server.service import Service


@dataclass(frozen=True)
class Running:
    """A server that answers, and what it serves."""

    address: str
    service: Service
    model: TriModeModel
    client: openai.OpenAI

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def demo_model(demo: Path) -> Iterator[TriModeModel]:
    with TriModeModel.from_pretrained(demo, num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def running(demo_model: TriModeModel) -> Iterator[Running]:
    with Engine(demo_model, max_rows=4, max_queue=64) as engine:
        metrics = Metrics(engine.stats, "demo", demo_model.model.max_length, {})
        service = Service(engine, "demo", observers=(metrics,))
        with (
            serving(service, routers=[metrics_router(metrics)]) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        ):
            yield Running(address, service, demo_model, client)
