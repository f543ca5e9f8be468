"""The nodes of `paceline serve --pipeline`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paceline.cli.replicas import cluster_parts

if TYPE_CHECKING:
    from paceline.engines.pipeline.settings import Pipeline
    from paceline.serving.settings import ServerSettings


@contextmanager
def pipeline_of(settings: ServerSettings) -> Iterator[Pipeline | None]:
    """Give the pipeline that the settings name; its Ray cluster is left at the end.

    Raises:
        PacelineError: there is no such cluster.
    """
    if settings.pipeline is None:
        yield None
        return
    from paceline.engines.pipeline.settings import Pipeline

    if settings.ray is None:
        yield Pipeline(settings.pipeline)
        return
    ray_cluster, _, _ = cluster_parts()
    from paceline.serving.cluster.pipeline_nodes import RayNodes

    with ray_cluster.cluster(settings.ray):
        yield Pipeline(settings.pipeline, RayNodes)
