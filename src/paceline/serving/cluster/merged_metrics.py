"""Merges the metrics of many replicas into those of one server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_SUMMED = ("counter", "histogram")
_REMEMBERED = 64  # replicas that are gone; older ones are added up for good

Families = Sequence[Metric]


class MergedMetrics:
    """Latest metrics of each replica, merged monotonically.

    A counter must not fall, or Prometheus takes it for a restart. So the last counts of a replica
    that is gone stay in the sums.
    """

    def __init__(self) -> None:
        self._known: dict[str, Families] = {}  # by name, the most recent last

    def of(self, current: Mapping[str, Families]) -> list[Metric]:
        """Merge the metrics of living replicas with the last ones of those that are gone."""
        for name, families in current.items():
            self._known.pop(name, None)
            self._known[name] = families
        gone = [name for name in self._known if name and name not in current]
        if len(gone) > _REMEMBERED:
            ended = {"": self._known.get("", [])}
            ended |= {name: self._known.pop(name) for name in gone[:-_REMEMBERED]}
            self._known[""] = merged(ended, ())
        return merged(self._known, current.keys())


def merged(known: Mapping[str, Families], living: Collection[str]) -> list[Metric]:
    """Add up counters and histograms; of other metrics each living replica keeps its own.

    Args:
        known: metrics by the name of the replica, which becomes the label `replica`.
        living: replicas whose other metrics are included.
    """
    described: dict[str, Metric] = {}
    samples_of: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for replica, families in known.items():
        for family in families:
            summed = family.type in _SUMMED
            if not summed and replica not in living:
                continue
            described.setdefault(family.name, family)
            samples = samples_of.setdefault(family.name, {})
            for sample in family.samples:
                if sample.name.endswith("_created"):  # meaningless for a sum
                    continue
                labels = sample.labels if summed else sample.labels | {"replica": replica}
                key = sample.name, frozenset(labels.items())
                value = sample.value + (samples[key].value if key in samples else 0.0)
                samples[key] = Sample(sample.name, labels, value)
    return [_family(described[name], samples.values()) for name, samples in samples_of.items()]


def _family(about: Metric, samples: Collection[Sample]) -> Metric:
    family = Metric(about.name, about.documentation, about.type)
    family.samples = list(samples)
    return family


def text(families: Families) -> bytes:
    """Return metrics in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_FixedCollector(families))
    return generate_latest(registry)


class _FixedCollector(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def describe(self) -> Iterator[Metric]:
        """Return nothing: the metrics have names already."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        return iter(self._families)
