"""The application in front of replicas: keys, rates, limits and metrics are kept here, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from paceline.serving.api.app import METRICS, open_to
from paceline.serving.api.error_forms import ErrorForms
from paceline.serving.api.errors import install
from paceline.serving.api.middleware import RequestGuard, Rules
from paceline.serving.cluster import merged_metrics
from paceline.serving.cluster.proxy import ReplicaProxy, ReplicaSet
from paceline.serving.cluster.usage import UsageLedger
from paceline.serving.metrics import RequestMetrics

_log = logging.getLogger(__name__)
_USAGE_SECONDS = 1.0  # between two reports of usage


def create_front(
    front: ReplicaProxy, fleet: ReplicaSet, rules: Rules | None = None, cors: Sequence[str] = ()
) -> FastAPI:
    """Return the application at the one address of all replicas.

    Args:
        front: passes requests on to replicas.
        fleet: the replicas.
        rules: who may use the API, how much and how long.
        cors: origins whose pages may use it; `*` is any.
    """
    rules, requests, merged = rules or Rules(), RequestMetrics(), merged_metrics.MergedMetrics()
    ledger = UsageLedger(rules.rates)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        usage_task = (
            asyncio.create_task(_collect_usage(fleet, ledger)) if rules.rates.tokens else None
        )
        yield
        if usage_task:
            usage_task.cancel()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    install(app)
    app.add_middleware(RequestGuard, rules=rules, metrics=requests, draining=lambda: front.draining)
    app.add_middleware(ErrorForms)
    open_to(app, cors)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Return 200 as long as this process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Return whether requests are accepted, and the number of replicas."""
        running = await fleet.running()
        accepting = running > 0 and not front.draining
        state = {"ready": accepting, "replicas": running, "wanted": fleet.size}
        return JSONResponse(state, 200 if accepting else 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Return the metrics for Prometheus."""
        measured = dict(await fleet.each("measured"))
        own = [*requests.families(), *_counts(front, fleet, len(measured))]
        names = {family.name for family in own}
        rest = [family for family in merged.of(measured) if family.name not in names]
        return Response(merged_metrics.text([*own, *rest]), media_type=METRICS)

    app.router.default = front
    app.state.context = front  # for the server: `retry`
    return app


def _counts(front: ReplicaProxy, fleet: ReplicaSet, measured: int) -> list[Metric]:
    return [
        GaugeMetricFamily("paceline_replicas", "Replicas that reported their metrics.", measured),
        GaugeMetricFamily("paceline_replicas_wanted", "Replicas that should exist.", fleet.size),
        CounterMetricFamily(
            "paceline_moved_requests", "Requests retried on another replica.", front.moved
        ),
    ]


async def _collect_usage(fleet: ReplicaSet, ledger: UsageLedger) -> None:
    """Ask the replicas for their token usage again and again."""
    while True:
        await asyncio.sleep(_USAGE_SECONDS)
        try:
            ledger.take(await fleet.each("usage", ledger.charged), monotonic())
        except Exception:  # a bug, ours or Ray's; the usage is reported again
            _log.exception("usage could not be collected")
