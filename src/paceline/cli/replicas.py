"""Engines on a Ray cluster, for the verbs that use them."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer

from paceline.cli.output import say
from paceline.errors import MethodError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from paceline.serving.api.middleware import Rules
    from paceline.serving.rate_limits import RateLimits
    from paceline.serving.settings import ServerSettings


def cluster_parts() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Import the modules of a cluster: joining it, batches on it, servers on it.

    Raises:
        MethodError: Ray is not installed.
    """
    try:
        from paceline.serving.cluster import batch, ray_cluster, servers
    except ImportError as error:
        raise MethodError(f"a cluster needs {error.name}; pip install 'paceline[ray]'") from None
    return ray_cluster, batch, servers


def scheme(settings: ServerSettings) -> str:
    """Return the scheme of a server's address."""
    return "http" if settings.ssl_certfile is None else "https"


def model_paths(model: str | None) -> list[Path]:
    """Return the folders of a model, several for an ensemble.

    Raises:
        ModelError: as `load`.
    """
    from paceline.engines.ensemble import parse_ensemble
    from paceline.models import load

    names = [str(name) for name, _ in parse_ensemble(model)] if model else [None]
    return [load(name).path for name in names]


def serve_replicas(
    build: Callable[[int, RateLimits], FastAPI],
    listener: socket.socket,
    settings: ServerSettings,
    rules: Rules,
) -> None:
    """Serve from a cluster until a signal comes.

    Args:
        build: makes a replica's application in its own process, given its threads and the rate
            limits that it reports its usage to.
        listener: accepts connections.
        settings: of the server, with `replicas`.
        rules: of the proxy in front of all replicas.

    Raises:
        PacelineError: there is no such cluster.
    """
    from paceline.serving.api.server import DrainingServer
    from paceline.serving.logs import log_to_stderr

    ray_cluster, _, servers = cluster_parts()
    from paceline.serving.cluster.app import create_front
    from paceline.serving.cluster.proxy import ReplicaProxy

    count = settings.replicas or 1
    with ray_cluster.cluster(settings.ray):
        threads = settings.threads or ray_cluster.processors(count)
        ongoing = settings.max_running + settings.queue
        with servers.replicated(build, count, threads, ongoing, settings) as fleet:
            front = ReplicaProxy(fleet)
            server = DrainingServer(
                create_front(front, fleet, rules, settings.cors), front, settings
            )
            listener.listen()  # clients may connect as soon as the next line is printed
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            address = f"{scheme(settings)}://{host}:{port}"
            say(f"serving {settings.name} on {address}, {count} times {threads} threads")
            log_to_stderr(settings.log_format)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the cluster is left; Ray exits
            server.run([listener])
    if server.force_exit:
        raise typer.Exit(1)
