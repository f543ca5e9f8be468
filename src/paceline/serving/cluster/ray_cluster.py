"""Joins a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray

from paceline.errors import RequestError


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start one here; leave it at the end.

    Raises:
        RequestError: it cannot be joined.
    """
    own: dict[str, Any] = {"log_to_driver": False}
    if address in (None, "local"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
        own["include_dashboard"] = False
    else:
        _reach(str(address))
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(f"cannot join the Ray cluster at {address}: {error}") from None
    with redirect_stdout(sys.stderr):  # Ray writes about dead nodes there, even at its end
        try:
            yield
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Refuse at once an address that Ray would try to reach for minutes.

    Raises:
        RequestError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and "/" not in host):
        return  # a name that Ray resolves, such as `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), 10).close()
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot join the Ray cluster at {address}: {error}") from None


def nodes() -> int:
    """Return the number of nodes in the cluster that have processors."""
    return len(_processors())


def processors(replicas: int) -> int:
    """Return the threads for each of `replicas` engines, so that all processors are used."""
    known = _processors()
    return max(min(max(known), sum(known) // replicas), 1)


def _processors() -> list[int]:
    known = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [each for each in known if each] or [1]
