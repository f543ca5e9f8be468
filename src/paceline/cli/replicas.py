"""Engines on a Ray cluster, for the verbs that use them."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from paceline.cli.output import say
from paceline.errors import MethodError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from paceline.serving.settings import Settings


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
    build: Callable[[int], FastAPI], listener: socket.socket, settings: Settings
) -> None:
    """Serve from a cluster until a signal comes.

    Args:
        build: makes a replica's application, where it is, with so many threads.
        listener: where requests come in.
        settings: of the server, with `replicas`.

    Raises:
        PacelineError: there is no such cluster.
    """
    import uvicorn

    from paceline.serving.logs import log_to_stderr

    join, _, servers = cluster_parts()
    count = settings.replicas or 1
    with join.cluster(settings.ray):
        threads = settings.threads or join.processors(count)
        ongoing = settings.places + settings.queue
        with servers.replicated(build, count, threads, ongoing, settings) as front:
            listener.listen()  # who reads the next line may come at once
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            say(f"serving {settings.name} on http://{host}:{port}, {count} times {threads} threads")
            log_to_stderr()
            config = uvicorn.Config(
                front,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=settings.max_connections,
                timeout_graceful_shutdown=int(settings.drain),
            )
            # The server raises the signal once more at its end; Ray's own handler exits with 15.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            uvicorn.Server(config).run([listener])
