"""The application in front of replicas: what holds for all of them is kept here, once."""

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
from paceline.serving.api.errors import install
from paceline.serving.api.middleware import RequestGuard, Rules
from paceline.serving.cluster import merged_metrics
from paceline.serving.cluster.proxy import ReplicaProxy, ReplicaSet
from paceline.serving.cluster.usage import UsageLedger
from paceline.serving.metrics import RequestMetrics

_log = logging.getLogger(__name__)
_BILLING = 1.0  # seconds between bills


def create_front(
    front: ReplicaProxy, fleet: ReplicaSet, rules: Rules | None = None, cors: Sequence[str] = ()
) -> FastAPI:
    """One address for a fleet: keys, rates, limits and metrics of the whole.

    Args:
        front: passes on what is not answered here.
        fleet: the replicas.
        rules: who may ask, how much and how long.
        cors: origins whose pages may ask; `*` is any.
    """
    rules, visits, said = rules or Rules(), RequestMetrics(), merged_metrics.MergedMetrics()
    till = UsageLedger(rules.rates)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        billing = asyncio.create_task(_bill(fleet, till)) if rules.rates.tokens else None
        yield
        if billing:
            billing.cancel()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    install(app)
    app.add_middleware(RequestGuard, rules=rules, metrics=visits, draining=lambda: front.draining)
    open_to(app, cors)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken, and by how many."""
        running = await fleet.running()
        taken = running > 0 and not front.draining
        told = {"ready": taken, "replicas": running, "wanted": fleet.size}
        return JSONResponse(told, 200 if taken else 503)

    @app.get("/metrics")
    async def told() -> Response:
        """What Prometheus reads."""
        heard = dict(await fleet.each("measured"))
        own = [*visits.families(), *_counts(front, fleet, len(heard))]
        names = {family.name for family in own}
        rest = [family for family in said.of(heard) if family.name not in names]
        return Response(merged_metrics.text([*own, *rest]), media_type=METRICS)

    app.router.default = front
    app.state.context = front  # where the server asks when who finds no connection may come again
    return app


def _counts(front: ReplicaProxy, fleet: ReplicaSet, heard: int) -> list[Metric]:
    return [
        GaugeMetricFamily("paceline_replicas", "Replicas that told their numbers.", heard),
        GaugeMetricFamily("paceline_replicas_wanted", "Replicas there should be.", fleet.size),
        CounterMetricFamily(
            "paceline_moved_requests", "Times that a request was tried again.", front.moved
        ),
    ]


async def _bill(fleet: ReplicaSet, till: UsageLedger) -> None:
    """Ask again and again what is owed."""
    while True:
        await asyncio.sleep(_BILLING)
        try:
            till.take(await fleet.each("bill", till.paid), monotonic())
        except Exception:  # a bug, or Ray's; what is owed is told again
            _log.exception("no bills came")
