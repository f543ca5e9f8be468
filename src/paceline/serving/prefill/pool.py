"""All prefill replicas of a server: which one is free, and new ones for those that are lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Lock, Thread

from paceline.engines.base import Engine
from paceline.engines.pipeline.remote import RemoteNodes
from paceline.engines.pipeline.stage import StageLostError
from paceline.errors import ModelError, PacelineError
from paceline.serving.prefill.replica import PrefillReplica

_ATTEMPTS = 5  # to start a replica again, one after the other
_PAUSE = 1.0  # seconds between them, each time doubled
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PrefillStatistics:
    """Counts since the start.

    Attributes:
        prompts: texts that replicas have read.
        tokens: tokens that they ran; less than came, where their prefix caches held some.
        pages: pages that came over.
        again: texts whose reading went on elsewhere, since a replica was lost or had no room.
        lost: replicas that were lost.
    """

    prompts: int = 0
    tokens: int = 0
    pages: int = 0
    again: int = 0
    lost: int = 0


class PrefillPool:
    """Starts prefill replicas and replaces those that are lost.

    Args:
        nodes: starts them.
        count: number of them.
        engine: of this process.
        threshold: tokens that a text must lack at least to be read by one.

    Attributes:
        statistics: counts, updated by whoever hands out prompts.
        arrived: is set when something came from a replica, or one was lost or started.

    Raises:
        PacelineError: a replica cannot be started; why, in one sentence.
    """

    def __init__(self, nodes: RemoteNodes, count: int, engine: Engine, threshold: int) -> None:
        self.threshold, self.statistics, self.arrived = threshold, PrefillStatistics(), Event()
        self._nodes, self._engine = nodes, engine
        self._replicas: list[PrefillReplica | None] = [None] * count
        self._gone_bytes = [0, 0]  # received from and sent to replicas that were lost
        self._starting = Lock()  # one thread at a time starts replicas
        self._closed = Event()
        try:
            self._start(range(count))
        except StageLostError as error:
            nodes.close()
            raise ModelError(f"{error}; look for what ends it, e.g. its memory") from None
        except BaseException:
            nodes.close()
            raise

    @property
    def replicas(self) -> list[PrefillReplica]:
        """Those that were not lost when they were last looked at."""
        return [each for each in self._replicas if each is not None]

    @property
    def received_bytes(self) -> int:
        """Bytes of pages that came."""
        return self._gone_bytes[0] + sum(each.received for each in self.replicas)

    @property
    def sent_bytes(self) -> int:
        """Bytes of pages that went to replicas."""
        return self._gone_bytes[1] + sum(each.sent for each in self.replicas)

    def free(self) -> PrefillReplica | None:
        """Return a replica that can be given a prompt; None: there is none now."""
        return next((each for each in self.replicas if each.free), None)

    def drop_lost(self) -> list[PrefillReplica]:
        """Return the replicas that were lost since the last call, and start others for them."""
        gone = []
        for index, replica in enumerate(self._replicas):
            if replica is not None and replica.lost:
                _log.warning("%s; another one is started", replica.lost)
                self._replicas[index] = None
                self._gone_bytes[0] += replica.received
                self._gone_bytes[1] += replica.sent
                self.statistics.lost += 1
                gone.append(replica)
                Thread(
                    target=self._restart, args=(index,), name="paceline-prefill", daemon=True
                ).start()
        return gone

    def close(self) -> None:
        """End all replicas; twice is harmless."""
        self._closed.set()
        self._nodes.close()  # first: one that is starting would be waited for
        with self._starting:
            for replica in self.replicas:
                replica.close()
            self._replicas = [None] * len(self._replicas)
            self._nodes.close()

    def _start(self, indices: Sequence[int]) -> None:
        links = self._nodes.connect(indices)
        for index, link in zip(indices, links, strict=True):
            name = self._nodes.name(index)
            self._replicas[index] = PrefillReplica(link, name, self._engine, self.arrived)
        self.arrived.set()

    def _restart(self, index: int) -> None:
        """Start a replica again; prompts are read by others or here until it is there."""
        name, pause = self._nodes.name(index), _PAUSE
        for _ in range(_ATTEMPTS):
            with self._starting:
                if self._closed.is_set():
                    return
                try:
                    self._start([index])
                    return
                except StageLostError as error:
                    reason = str(error)
                except PacelineError as error:
                    _log.error("%s is not started again: %s", name, error)
                    return
                except Exception:
                    if not self._closed.is_set():
                        _log.exception("%s is not started again", name)
                    return
            self._closed.wait(pause)
            pause *= 2
        _log.error("%s is not started again after %d attempts: %s", name, _ATTEMPTS, reason)
