"""The application in front of a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

from paceline import __version__
from paceline.serving import playground
from paceline.serving.api import chat, completions, responses, tokenize
from paceline.serving.api.dependencies import Dependencies, Here
from paceline.serving.api.errors import describe, install
from paceline.serving.api.middleware import RequestGuard, Rules
from paceline.serving.api.parse import RequestLimits
from paceline.serving.metrics import Metrics
from paceline.serving.service import Service

METRICS = "text/plain; version=1.0.0; charset=utf-8"  # the type of what Prometheus reads


def create_app(
    service: Service,
    name: str,
    limits: RequestLimits | None = None,
    rules: Rules | None = None,
    cors: Sequence[str] = (),
) -> FastAPI:
    """The API of a service, which starts and stops with it if it is not started.

    Args:
        service: runs requests.
        name: what the model is called.
        limits: what may be asked for.
        rules: who may ask, how much and how long.
        cors: origins whose pages may ask; `*` is any.
    """
    rules, metrics = rules or Rules(), Metrics(service)
    service.observers.append(metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="Paceline", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.context = here = Dependencies(service, name, limits or RequestLimits())
    service.observers.append(here.departures)
    install(app)
    for part in (completions, chat, responses, tokenize):
        app.include_router(part.router)
    app.include_router(playground.router)
    inside: dict[str, Any] = {"rules": rules, "metrics": metrics, "lm": service.worker.lm}
    app.add_middleware(RequestGuard, **inside, draining=lambda: service.draining)
    open_to(app, cors)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Not now."}})
    async def ready(here: Here) -> JSONResponse:
        """Whether requests are taken."""
        taken = here.service.ready
        return JSONResponse({"ready": taken}, 200 if taken else 503)

    @app.get("/metrics", response_class=Response)
    async def told() -> Response:
        """What Prometheus reads."""
        return Response(metrics.text(), media_type=METRICS)

    app.state.metrics = metrics
    describe(app)
    return app


def open_to(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins ask."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
