"""Shows metrics to Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from trimode.server.metrics import CONTENT_TYPE, Metrics


def metrics_router(metrics: Metrics) -> APIRouter:
    """Make the route of metrics."""
    router = APIRouter(tags=["state"])

    @router.get("/metrics", response_class=Response)
    async def show() -> Response:
        """Show all metrics in Prometheus' text format."""
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return router
