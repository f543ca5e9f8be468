"""Prometheus metrics: request times are observed as they happen, counters are read at a scrape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from paceline.serving.messages import Job, JobEvent
from paceline.serving.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_TREES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class RequestMetrics:
    """A registry of its own, with the metrics that every server has."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests.", "path", "status")

    def families(self) -> list[Metric]:
        """Return the current metrics."""
        return list(self.registry.collect())

    def text(self) -> bytes:
        """Return the current metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"paceline_{name}", about, labels, registry=self.registry)


class Metrics(RequestMetrics):
    """Observes a service and exposes what it saw."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.registry.register(_WorkerCollector(service))
        self.answers = self._counter("answers", "Answers by finish reason.", "finish")
        self.prompt = self._counter("prompt_tokens", "Prompt tokens of finished answers.")
        self.first = self._histogram(
            "time_to_first_token_seconds", "Time from the request to its first token.", _SECONDS
        )
        self.each = self._histogram(
            "time_per_output_token_seconds", "Mean time between tokens of an answer.", _SHORT
        )
        self.whole = self._histogram(
            "answer_seconds", "Time from the request to the end of its answer.", _SECONDS
        )
        self.tokens_per_pass = self._histogram(
            "tokens_per_pass", "Tokens of an answer from one pass.", (1, 2, 3, 4, 6, 8, 12, 16)
        )
        self._begun: dict[str, tuple[float, float | None]] = {}  # start, first token

    def on_submit(self, job: Job) -> None:
        """See `Observer`."""
        self._begun[job.id] = monotonic(), None

    def on_event(self, job: Job, event: JobEvent) -> None:
        """See `Observer`."""
        start, first = self._begun.get(job.id, (monotonic(), None))
        now = monotonic()
        if event.tokens:
            self.tokens_per_pass.observe(len(event.tokens))
            if first is None:
                self.first.observe(now - start)
                self._begun[job.id] = start, now
        if event.finish is None:
            return
        self._begun.pop(job.id, None)
        self.answers.labels(event.finish).inc()
        self.prompt.inc(len(job.request.prompt))
        self.whole.observe(now - start)
        tokens = len(event.output.tokens) if event.output else 0
        if first is not None and tokens > 1:
            self.each.observe((now - first) / (tokens - 1))

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"paceline_{name}", about, buckets=buckets, registry=self.registry)


class _WorkerCollector(Collector):
    """Reads the worker's counters at a scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        """Return nothing: metrics are made by `collect`."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        stats, load = self._service.worker.stats, self._service.load
        yield _gauge("queue_length", "Requests that wait.", load.waiting)
        yield _gauge("running", "Requests that run.", load.running)
        if load.memory:
            yield _gauge("kv_pages_used", "Pages of keys and values in use.", load.memory.used)
            limit = load.memory.limit
            about = "Maximum pages of keys and values."
            yield _gauge("kv_pages_limit", about, float("inf") if limit is None else limit)
            yield _gauge("kv_page_bytes", "Bytes of a page.", load.memory.page_bytes)
        yield _gauge("guide_kv_bytes", "Bytes of keys and values of guide models.", load.guides)
        share = self._service.worker.lm.engine.head_share
        yield _gauge("head_read_share", "Part of the model's head that passes read.", share)
        counts = {
            "passes": (stats.passes, "Forward passes."),
            "pass_nodes": (stats.nodes, "Prompt tokens and tree nodes in passes."),
            "computed_prompt_tokens": (stats.prompt_tokens, "Prompt tokens that were computed."),
            "cached_tokens": (stats.cached_tokens, "Prompt tokens taken from the prefix cache."),
            "generated_tokens": (stats.tokens, "Tokens that were generated."),
            "preemptions": (stats.preempted, "Running requests that were preempted."),
            "kv_policy_freed_pages": (stats.freed_pages, "Pages that KV policies gave back."),
            "failures": (self._service.failures, "Passes that failed because of a bug."),
            "draft_seconds": (stats.draft, "Time spent drafting."),
            "forward_seconds": (stats.forward, "Time spent in passes of the model."),
            "guide_seconds": (
                stats.guide,
                "Time spent in passes of guides over trees and prompts.",
            ),
            "walk_seconds": (stats.walk, "Time spent sampling, learning and bookkeeping."),
        }
        for name, (value, about) in counts.items():
            yield CounterMetricFamily(f"paceline_{name}", about, value=value)
        yield from self._prefill()
        yield from self._stored_pages()
        yield from self._chunks()
        yield _by_drafter("guessed_tokens", "Nodes that a drafter proposed.", stats.guessed)
        yield _by_drafter("accepted_tokens", "Proposed nodes that were accepted.", stats.accepted)
        yield from self._governor()

    def _prefill(self) -> Iterator[Metric]:
        """Yield the counters of prefill replicas, if there are any."""
        pool = self._service.worker.prefill
        if pool is None:
            return
        counts = pool.statistics
        yield _gauge("prefill_replicas", "Prefill replicas that run.", len(pool.replicas))
        for name, value, about in (
            ("prompts", counts.prompts, "Texts that prefill replicas have read."),
            ("tokens", counts.tokens, "Tokens that prefill replicas have run."),
            ("pages", counts.pages, "Pages of keys and values that came from them."),
            ("received_bytes", pool.received_bytes, "Bytes of pages that came from them."),
            ("sent_bytes", pool.sent_bytes, "Bytes of pages that they did not hold."),
            ("again", counts.again, "Texts whose reading went on elsewhere."),
            ("lost", counts.lost, "Prefill replicas that were lost."),
        ):
            yield CounterMetricFamily(f"paceline_prefill_apart_{name}", about, value=value)

    def _stored_pages(self) -> Iterator[Metric]:
        """Yield the counters of the prefix cache on disk, if there is one."""
        store = self._service.worker.lm.pages
        if store is None:
            return
        counts = store.statistics
        yield _gauge(
            "stored_prefix_bytes", "Size of the prefix cache on disk.", counts.stored_bytes
        )
        for name, value, about in (
            ("read", counts.read_pages, "Pages that were read instead of computed."),
            ("written", counts.written_pages, "Pages that were written to disk."),
            ("unusable", counts.unusable_pages, "Files of pages that could not be used."),
            ("evicted", counts.evicted_pages, "Pages that were removed to keep the limit."),
        ):
            yield CounterMetricFamily(f"paceline_stored_pages_{name}", about, value=value)
        about = "Texts that were not written to disk: the writer was behind, or could not write."
        yield CounterMetricFamily("paceline_stored_texts_skipped", about, counts.skipped_texts)

    def _chunks(self) -> Iterator[Metric]:
        """Yield the counters of the cache of documents."""
        cache = self._service.worker.lm.request_builder.chunks
        counts, folder = cache.statistics, cache.folder
        yield _gauge("chunk_cache_bytes", "Keys and values of documents in memory.", cache.nbytes)
        values = {
            "memory_hits": (counts.memory_hits, "Documents that were in memory."),
            "disk_hits": (counts.disk_hits, "Documents that were read from disk."),
            "misses": (counts.misses, "Documents that had to be computed."),
            "evicted": (counts.evicted, "Documents that were removed from memory for others."),
        }
        if folder is not None:
            about = "Keys and values of documents on disk."
            yield _gauge("chunk_folder_bytes", about, folder.stored_bytes)
            values |= {
                "written": (counts.written, "Documents that were written to disk."),
                "unusable": (folder.unusable, "Files of documents that could not be used."),
                "folder_evicted": (folder.evicted, "Documents that were removed from disk."),
                "skipped": (counts.skipped, "Documents that were not written to disk."),
            }
        for name, (value, about) in values.items():
            yield CounterMetricFamily(f"paceline_chunk_cache_{name}", about, value=value)

    def _governor(self) -> Iterator[Metric]:
        governor = self._service.worker.governor
        sizes = dict(governor.sizes)
        buckets = [(str(t), sum(c for n, c in sizes.items() if n <= t)) for t in _TREES]
        yield HistogramMetricFamily(
            "paceline_governor_tree_nodes",
            "Nodes, roots included, that the governor chose for a whole pass.",
            buckets=[*buckets, ("+Inf", sum(sizes.values()))],
            sum_value=sum(nodes * count for nodes, count in sizes.items()),
        )
        plain = "Passes that the governor ran without drafts."
        yield CounterMetricFamily("paceline_governor_plain_passes", plain, governor.plain_passes)
        state, _, why = str(governor.report()["reason"]).partition(": ")
        labels = [state, re.sub(r"\d+(\.\d+)?", "N", why)]
        reason = GaugeMetricFamily(
            "paceline_governor_reason",
            "Why the governor drafts now, or does not.",
            labels=["state", "why"],
        )
        reason.add_metric(labels, 1)
        yield reason


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"paceline_{name}", about, value=value)


def _by_drafter(name: str, about: str, counts: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"paceline_{name}", about, labels=["drafter"])
    for drafter, count in counts.copy().items():
        family.add_metric([drafter], count)
    return family
