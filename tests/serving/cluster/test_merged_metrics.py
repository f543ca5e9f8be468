"""Metrics of many replicas as Prometheus reads those of one server."""

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from paceline.serving.cluster.merged_metrics import _REMEMBERED, MergedMetrics, merged, text


def said(count, gauge=0.0, times=()):
    """What a replica says that has counted so far."""
    registry = CollectorRegistry()
    counter = Counter("done", "Done.", ["by"], registry=registry)
    for by, number in count.items():
        counter.labels(by).inc(number)
    Gauge("now", "Now.", registry=registry).set(gauge)
    histogram = Histogram("time", "Time.", buckets=(1.0, 2.0), registry=registry)
    for each in times:
        histogram.observe(each)
    return list(registry.collect())


def figures(families):
    """By name and labels, as Prometheus reads them."""
    found = {}
    for family in text_string_to_metric_families(text(families).decode()):
        for sample in family.samples:
            key = sample.name, *sorted(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def test_sums_are_summed_and_the_rest_is_each_replicas_own():
    known = {"x": said({"a": 1, "b": 2}, 3.0, [0.5, 5.0]), "y": said({"b": 4}, 5.0, [1.5])}
    assert figures(merged(known, known)) == {
        ("done_total", ("by", "a")): 1,
        ("done_total", ("by", "b")): 6,
        ("now", ("replica", "x")): 3,
        ("now", ("replica", "y")): 5,
        ("time_bucket", ("le", "1.0")): 1,
        ("time_bucket", ("le", "2.0")): 2,
        ("time_bucket", ("le", "+Inf")): 3,
        ("time_count",): 3,
        ("time_sum",): 7,
    }
    assert [family.type for family in merged(known, known)] == ["counter", "gauge", "histogram"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("xyz"), st.integers(1, 5)), min_size=1, max_size=8))
def test_no_sum_ever_falls(scrapes):
    whole, counts, last = MergedMetrics(), {}, 0.0
    for scrape in scrapes:
        for name, more in scrape.items():
            counts[name] = counts.get(name, 0) + more
        found = figures(whole.of({name: said({"a": counts[name]}) for name in scrape}))
        assert {key[1][1] for key in found if key[0] == "now"} == set(scrape)
        total = found.get(("done_total", ("by", "a")), 0.0)
        assert total == sum(counts.values()) >= last
        last = total


def test_replicas_of_the_past_are_added_up():
    whole = MergedMetrics()
    for number in range(3 * _REMEMBERED):
        found = figures(whole.of({f"r{number}": said({"a": 1}, number)}))
        assert found["done_total", ("by", "a")] == number + 1
        assert len([key for key in found if key[0] == "now"]) == 1
    assert len(whole._known) <= _REMEMBERED + 2
    assert figures(whole.of({})) == {key: value for key, value in found.items() if key[0] != "now"}
