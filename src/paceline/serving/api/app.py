"""The HTTP application in front of a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

from paceline import __version__
from paceline.serving.api import chat, completions, messages_api, ollama, responses, tokenize
from paceline.serving.api.dependencies import Dependencies, Here
from paceline.serving.api.error_forms import ErrorForms
from paceline.serving.api.errors import describe, install
from paceline.serving.api.middleware import RequestGuard, Rules
from paceline.serving.api.parse import RequestLimits
from paceline.serving.api.strict import HEADER
from paceline.serving.metrics import Metrics
from paceline.serving.service import Service

METRICS = "text/plain; version=1.0.0; charset=utf-8"  # media type of the metrics


def create_app(
    service: Service,
    name: str,
    limits: RequestLimits | None = None,
    rules: Rules | None = None,
    cors: Sequence[str] = (),
    routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """Return the API of a service, which is started and stopped with the application.

    Args:
        service: runs the requests; not started.
        name: of the model.
        limits: what a request may ask for.
        rules: who may use the API, how much and how long.
        cors: origins whose pages may use it; `*` is any.
        routers: further routes, such as the playground's.
    """
    rules, metrics = rules or Rules(), Metrics(service)
    service.observers.append(metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="Paceline",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        strict_content_type=False,  # a body without a type is JSON
    )
    app.state.context = here = Dependencies(service, name, limits or RequestLimits())
    service.observers.append(here.departures)
    install(app)
    openai = (completions.router, chat.router, responses.router, tokenize.router)
    own = (*openai, messages_api.router, ollama.router)
    for router in (*own, *routers):
        app.include_router(router)
    inside: dict[str, Any] = {"rules": rules, "metrics": metrics, "lm": service.worker.lm}
    app.add_middleware(RequestGuard, **inside, draining=lambda: service.draining)
    app.add_middleware(ErrorForms)
    open_to(app, cors)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Return 200 as long as the process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Not accepting requests."}})
    async def ready(here: Here) -> JSONResponse:
        """Return 200 while requests are accepted, else 503."""
        accepting = here.service.ready
        return JSONResponse({"ready": accepting}, 200 if accepting else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics_page() -> Response:
        """Return the metrics for Prometheus."""
        return Response(metrics.text(), media_type=METRICS)

    app.state.metrics = metrics
    describe(app)
    return app


def open_to(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins use the API."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-Api-Key", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After", HEADER],
        )
