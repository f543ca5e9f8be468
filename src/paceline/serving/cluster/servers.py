"""Servers on a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from paceline.serving.cluster.replica import Replica, ResponsePart
from paceline.serving.cluster.router import AffinityRouter
from paceline.serving.rate_limits import RateLimits
from paceline.serving.settings import ServerSettings

_APP, _NAME = "paceline", "replica"
_PATIENCE = 5.0  # seconds to wait for a status
_CHECKS = 2.0  # seconds between health checks


class _RayReplica(Replica):
    """A replica named by Ray."""

    def __init__(self, build: Callable[[RateLimits], FastAPI]) -> None:
        super().__init__(build, serve.get_replica_context().replica_tag)


class RayReplicaSet:
    """The replicas of a deployment; see `ReplicaSet`."""

    lost = (RayActorError, ObjectLostError, WorkerCrashedError)

    def __init__(self, handle: DeploymentHandle[Any], size: int) -> None:
        self._handle, self.size = handle, size
        self._handle_request = handle.options(method_name="handle", stream=True)

    async def handle(
        self, scope: dict[str, Any], body: bytes, key: str
    ) -> AsyncGenerator[ResponsePart, None]:
        """See `ReplicaSet`."""
        parts = self._handle_request.remote(scope, body, key=key)
        try:
            async for part in parts:
                yield part
        finally:
            parts.cancel()

    async def each(self, method: str, *args: Any) -> list[Any]:
        """See `ReplicaSet`."""
        try:
            results = await self._handle.broadcast(method, *args).results_async(
                timeout_s=_PATIENCE, return_exceptions=True
            )
        except (TimeoutError, DeploymentUnavailableError):
            return []
        return [each for each in results if not isinstance(each, BaseException)]

    async def running(self) -> int:
        """Return the number of living replicas; Ray's controller notices a death within seconds."""
        try:
            status = await asyncio.wait_for(asyncio.to_thread(serve.status), _PATIENCE)
            known = status.applications[_APP].deployments[_NAME].replica_states
        except (TimeoutError, RayError, RayServeException, KeyError):
            return 0
        return int(known.get("RUNNING", 0))


@contextmanager
def replicated(
    build: Callable[[int, RateLimits], FastAPI],
    replicas: int,
    threads: int,
    ongoing: int,
    settings: ServerSettings,
) -> Iterator[RayReplicaSet]:
    """Run `replicas` servers on the joined cluster.

    Args:
        build: makes a replica's application on its node, given its threads and the rate limits that
            record usage.
        replicas: their number.
        threads: processors of each.
        ongoing: maximum running requests of each; further ones wait in front.
        settings: of the server; `drain` is used.
    """
    logs = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="Disabled", logging_config=logs)
    deployment = serve.deployment(_RayReplica, name=_NAME).options(
        num_replicas=replicas,
        logging_config=logs,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": threads},
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=_CHECKS,
        request_router_config=RequestRouterConfig(request_router_class=AffinityRouter),
    )
    handle = serve.run(deployment.bind(partial(build, threads)), name=_APP, route_prefix=None)
    try:
        yield RayReplicaSet(handle, replicas)
    finally:
        serve.delete(_APP)
