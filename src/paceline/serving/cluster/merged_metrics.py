"""The metrics of many replicas as those of one server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_SUMMED = ("counter", "histogram")
_REMEMBERED = 64  # replicas that are not heard; older ones are added up for good

Families = Sequence[Metric]


class MergedMetrics:
    """What every replica said last.

    A sum must not fall, or Prometheus takes it for a restart. So a replica that is gone stays in
    the sums with what it said last.
    """

    def __init__(self) -> None:
        self._known: dict[str, Families] = {}  # by name, who was heard last is last

    def of(self, said: Mapping[str, Families]) -> list[Metric]:
        """As `merged`, with replicas of the past; `said` is by those that live."""
        for name, families in said.items():
            self._known.pop(name, None)
            self._known[name] = families
        gone = [name for name in self._known if name and name not in said]
        if len(gone) > _REMEMBERED:
            ended = {"": self._known.get("", [])}
            ended |= {name: self._known.pop(name) for name in gone[:-_REMEMBERED]}
            self._known[""] = merged(ended, ())
        return merged(self._known, said.keys())


def merged(known: Mapping[str, Families], living: Collection[str]) -> list[Metric]:
    """Counters and histograms are added up; of all else each living replica has its own.

    Args:
        known: what each replica says, by its name, which becomes the label `replica`.
        living: those of which more than sums is told.
    """
    abouts: dict[str, Metric] = {}
    found: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for replica, families in known.items():
        for family in families:
            summed = family.type in _SUMMED
            if not summed and replica not in living:
                continue
            abouts.setdefault(family.name, family)
            samples = found.setdefault(family.name, {})
            for sample in family.samples:
                if sample.name.endswith("_created"):  # of a sum it says nothing
                    continue
                labels = sample.labels if summed else sample.labels | {"replica": replica}
                key = sample.name, frozenset(labels.items())
                value = sample.value + (samples[key].value if key in samples else 0.0)
                samples[key] = Sample(sample.name, labels, value)
    return [_family(abouts[name], samples.values()) for name, samples in found.items()]


def _family(about: Metric, samples: Collection[Sample]) -> Metric:
    family = Metric(about.name, about.documentation, about.type)
    family.samples = list(samples)
    return family


def text(families: Families) -> bytes:
    """As Prometheus reads it."""
    registry = CollectorRegistry()
    registry.register(_FixedCollector(families))
    return generate_latest(registry)


class _FixedCollector(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def describe(self) -> Iterator[Metric]:
        """Nothing: they have names already."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        return iter(self._families)
