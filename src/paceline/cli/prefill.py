"""The processes of `paceline serve --prefill-replicas`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.cli.replicas import cluster_parts
from paceline.machine import usable_cores

if TYPE_CHECKING:
    from paceline.lm import LM
    from paceline.serving.prefill.pool import PrefillPool
    from paceline.serving.settings import ServerSettings


def shared_threads(settings: ServerSettings) -> ServerSettings:
    """Divide the cores of this machine among this process and prefill replicas on it."""
    apart = settings.prefill_replicas
    native = settings.engine in ("auto", "native") and settings.device is None
    if apart is None or settings.ray is not None or settings.threads is not None or not native:
        return settings
    return replace(settings, threads=max(1, usable_cores() // (apart + 1)))


@contextmanager
def prefill_of(settings: ServerSettings) -> Iterator[Callable[[LM], PrefillPool | None]]:
    """Give what starts the prefill replicas that the settings name; they end with the context.

    Raises:
        PacelineError: there is no such Ray cluster.
    """
    if settings.prefill_replicas is None:
        yield lambda lm: None
        return
    from paceline.serving.prefill.opening import open_prefill
    from paceline.serving.prefill.settings import Prefill, PrefillSettings, check_prefill

    with ExitStack() as stack:
        prefill = Prefill(settings.prefill_replicas, settings.prefill_threshold)
        if settings.ray is not None:
            ray_cluster, _, _ = cluster_parts()
            from paceline.serving.cluster.pipeline_nodes import RayNodes

            if settings.pipeline is None:  # which has joined it otherwise
                stack.enter_context(ray_cluster.cluster(settings.ray))
            prefill = replace(prefill, launch=RayNodes)

        def start(lm: LM) -> PrefillPool:
            check_prefill(lm.engine, settings.kv_policy, settings.weight_memory is not None)
            told = PrefillSettings(
                settings.model,
                settings.engine,
                settings.threads,
                settings.device,
                settings.format,
                settings.kv_format,
                settings.weights_memory,
                settings.rope,
                settings.memory,
            )
            pool = open_prefill(lm.model, lm.engine, prefill, told)
            stack.callback(pool.close)
            return pool

        yield start
