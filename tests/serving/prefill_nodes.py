"""Prefill replicas in threads of this process, which tests can break."""

from __future__ import annotations

import socket
from contextlib import contextmanager, suppress
from threading import Thread

from paceline.engines.factory import open_engine
from paceline.engines.pipeline.wire import Link, WireError
from paceline.serving.prefill.node import NodeServer, PromptReader
from paceline.serving.prefill.pool import PrefillPool
from paceline.serving.worker import Worker


def pair() -> tuple[Link, Link]:
    """Two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return Link(one), Link(other)


class ThreadNodes:
    """Starts replicas as threads; `broken` may wrap the link of each, by how many were started."""

    def __init__(self, lm, memory=None, broken=lambda number, link: link):
        self.lm, self.memory, self.broken, self.readers = lm, memory, broken, []
        self.started, self.threads = 0, []

    def name(self, index):
        return f"prefill replica {index + 1}"

    def connect(self, indices):
        links = []
        for _ in indices:
            here, there = pair()
            there = self.broken(self.started, there)
            self.started += 1
            engine = open_engine(
                self.lm.model, "native", threads=1, kv_format=self.lm.engine.kv_format
            )
            self.readers.append(PromptReader(engine, self.memory))
            thread = Thread(target=self.serve, args=(there, self.readers[-1]), daemon=True)
            thread.start()
            self.threads.append(thread)
            links.append(here)
        return links

    def serve(self, link, reader):
        with suppress(WireError):
            NodeServer(link, reader).run()
        link.close()

    def close(self):
        """Nothing: a thread ends with its connection."""


@contextmanager
def prefilling(lm, count=1, threshold=64, pages=None, nodes=None, **options):
    """A worker with replicas, which leaves nothing behind."""
    pool = PrefillPool(nodes or ThreadNodes(lm), count, lm.engine, threshold)
    memory = None if pages is None else pages * lm.engine.memory.page_bytes
    worker = Worker(lm, memory=memory, prefill=pool, **options)
    try:
        yield worker
    finally:
        worker.close()
        pool.close()
        for thread in pool._nodes.threads:
            thread.join(60)
            assert not thread.is_alive()
        assert lm.engine.memory.used == 0
