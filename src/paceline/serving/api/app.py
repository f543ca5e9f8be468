"""The application in front of a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from paceline import __version__
from paceline.serving import playground
from paceline.serving.api import chat, completions, tokens
from paceline.serving.api.asking import Limits
from paceline.serving.api.context import Context, Here
from paceline.serving.api.refusals import install
from paceline.serving.service import Service


def create_app(service: Service, name: str, limits: Limits | None = None) -> FastAPI:
    """The API of a service, which starts and stops with it if it is not started.

    Args:
        service: runs requests.
        name: what the model is called.
        limits: what may be asked for.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="Paceline", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.context = Context(service, name, limits or Limits())
    install(app)
    for part in (completions, chat, tokens):
        app.include_router(part.router)
    app.include_router(playground.router)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(here: Here) -> JSONResponse:
        """Whether requests are taken."""
        taken = here.service.ready
        return JSONResponse({"ready": taken}, 200 if taken else 503)

    return app
