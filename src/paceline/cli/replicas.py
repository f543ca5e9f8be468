"""Engines on a Ray cluster, for the verbs that use them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from paceline.cli.output import say
from paceline.errors import MethodError

if TYPE_CHECKING:
    from fastapi import FastAPI


def cluster_parts() -> tuple[ModuleType, ModuleType, ModuleType]:
    """What a cluster takes: joining it, batches on it, servers on it.

    Raises:
        MethodError: Ray is not installed.
    """
    try:
        from paceline.serving.cluster import data, join, servers
    except ImportError as error:
        raise MethodError(f"a cluster needs {error.name}; pip install 'paceline[ray]'") from None
    return join, data, servers


def model_paths(model: str | None) -> list[Path]:
    """The folders of a model, several for an ensemble.

    Raises:
        ModelError: as `load`.
    """
    from paceline.engines.ensemble import parse_ensemble
    from paceline.models import load

    names = [str(name) for name, _ in parse_ensemble(model)] if model else [None]
    return [load(name).path for name in names]


def serve_replicas(
    build: Callable[[int], FastAPI],
    listener: socket.socket,
    address: str | None,
    replicas: int,
    threads: int | None,
    ongoing: int,
    drain: float,
) -> None:
    """Serve from a cluster until a signal comes.

    Args:
        build: makes a replica's application, where it is, with so many threads.
        listener: where requests come in.
        address: of the cluster; None starts one here.
        replicas: engines.
        threads: of each; None shares the cluster's processors out.
        ongoing: most requests under way at each engine; more wait.
        drain: seconds for those under way at the end.

    Raises:
        PacelineError: there is no such cluster.
    """
    import uvicorn

    join, _, servers = cluster_parts()
    with join.cluster(address):
        each = threads or join.processors(replicas)
        with servers.replicated(build, replicas, each, ongoing, drain) as front:
            host, port = listener.getsockname()[:2]
            say(f"{replicas} replicas on http://{host}:{port}, {each} threads each")
            config = uvicorn.Config(
                front, log_level="warning", timeout_graceful_shutdown=int(drain), lifespan="on"
            )
            uvicorn.Server(config).run([listener])
