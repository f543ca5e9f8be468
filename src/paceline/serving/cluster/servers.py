"""Servers on a Ray cluster behind one address."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.config import RequestRouterConfig

from paceline.serving.cluster.front import Front
from paceline.serving.cluster.replica import Part, Replica
from paceline.serving.cluster.router import Router
from paceline.serving.settings import Settings

_LOST = (RayActorError, ObjectLostError, WorkerCrashedError)
_APP = "paceline"


@contextmanager
def replicated(
    build: Callable[[int], FastAPI], replicas: int, threads: int, ongoing: int, settings: Settings
) -> Iterator[Front]:
    """So many servers on the cluster that is joined, and what is in front of them.

    Args:
        build: makes a replica's application, where it is, with so many threads.
        replicas: their number.
        threads: processors that each takes.
        ongoing: most requests under way at each; more wait in front.
        settings: of the server: `drain` and `max_body`.
    """
    logs = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="Disabled", logging_config=logs)
    deployment = serve.deployment(Replica).options(
        num_replicas=replicas,
        logging_config=logs,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": threads},
        graceful_shutdown_timeout_s=settings.drain,
        request_router_config=RequestRouterConfig(request_router_class=Router),
    )
    handle = serve.run(deployment.bind(partial(build, threads)), name=_APP, route_prefix=None)
    remote = handle.options(method_name="ask", stream=True)

    async def ask(scope: dict[str, Any], body: bytes, key: str) -> AsyncGenerator[Part, None]:
        parts = remote.remote(scope, body, key=key)
        try:
            async for part in parts:
                yield part
        finally:
            parts.cancel()

    try:
        yield Front(ask, _LOST, settings.max_body)
    finally:
        serve.delete(_APP)
