"""Decides what runs in the next pass: a pure state machine without engine, clock or I/O.

Every pass has the last token of each decoding request (with its tree) and as many prompt tokens as
the pass may carry besides: continuous batching (Orca, OSDI 2022) with chunked prefill
(Sarathi-Serve, arXiv 2403.02310). Several prompts share a pass without padding. Requests are
ordered by priority, and among equals by the client that was served least (Virtual Token Counter,
arXiv 2401.00588). When memory runs out, the latest of the least important requests is preempted and
recomputed later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from paceline.errors import RequestError

Stage = Literal["waiting", "prompt", "decoding"]


@dataclass(eq=False)
class ScheduledJob:
    """A request as the scheduler sees it.

    Attributes:
        id: unique name.
        text: tokens of prompt and output so far.
        most: maximum positions of memory that it may come to occupy.
        cost: positions of memory for each token, those in guides included.
        client: whose request it is; clients get equal shares.
        priority: a larger number is more urgent.
        deadline: on the caller's clock; past it the request ends. None sets no deadline.
        arrived: time of submission on the caller's clock.
        after: a request with the same prefix; this one waits until that one decodes.
        held: tokens of the text that were run.
        rows: tokens that take memory: `held`, or fewer where a KV policy drops some.
        max_rows: upper limit of `rows` under a KV policy; None: no limit.
        stage: `waiting`, `prompt` or `decoding`.
        order: number of the submission.
        reached: maximum of `held` so far; recomputed tokens are not charged to the client again.
        apart: another process reads its text, or will; none of it is run here.
    """

    id: str
    text: int
    most: int
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    arrived: float = 0.0
    after: str | None = None
    cost: float = 1.0
    held: int = 0
    rows: int = 0
    max_rows: int | None = None
    stage: Stage = "waiting"
    order: int = 0
    reached: int = 0
    apart: bool = False

    @property
    def missing(self) -> int:
        """Return the tokens to run before it decodes; the last one is the first tree's root."""
        return self.text - 1 - self.held

    def bounded(self, tokens: int) -> int:
        """Return how many rows so many tokens of its text may take."""
        return tokens if self.max_rows is None else min(tokens, self.max_rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens before and in the next pass, in this order.

    Attributes:
        expired: requests past their deadline; they are removed.
        preempted: requests that release their memory and wait again.
        admitted: requests that start to run.
        parts: requests, and how many of their missing tokens to run.
        decoding: requests that get a tree of at most `nodes` nodes, root included.
        nodes: maximum nodes of each tree.
    """

    expired: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    parts: list[tuple[str, int]] = field(default_factory=list)
    decoding: list[str] = field(default_factory=list)
    nodes: int = 1


class Scheduler:
    """Plans passes; the caller runs them and reports the result.

    Args:
        max_running: maximum number of running requests.
        capacity: positions that the engine's memory holds.
        queue: maximum number of waiting requests.
        aging: seconds of waiting that weigh as much as one step of priority, so that no request
            starves. Of a client's requests with one priority only the first ages, so that many
            requests of one client do not outweigh few of another.
        tree: maximum nodes of a tree, for which memory is reserved.
        loss: positions that a request may waste besides those it holds, since memory comes in
            pages.
    """

    def __init__(
        self,
        max_running: int = 32,
        capacity: int = 1 << 20,
        queue: int = 1024,
        aging: float = 30.0,
        tree: int = 64,
        loss: int = 0,
    ) -> None:
        self.max_running, self.capacity, self.queue = max_running, capacity, queue
        self.aging, self.tree, self.loss = aging, tree, loss
        self.jobs: dict[str, ScheduledJob] = {}
        self._running: dict[str, ScheduledJob] = {}
        self._clients: Counter[str] = Counter()  # requests of each client
        self._served: dict[str, float] = {}  # client -> tokens
        self._last_admitted: dict[tuple[str, int], float] = {}  # client, priority -> last admission
        self._orders = 0

    @property
    def waiting(self) -> list[ScheduledJob]:
        """Return the waiting requests in the order of their arrival."""
        return [job for job in self.jobs.values() if job.stage == "waiting"]

    @property
    def running(self) -> list[ScheduledJob]:
        """Return the running requests, the most important first."""
        # All age alike, so the order never changes: the first one is never preempted, and ends.
        return sorted(
            self._running.values(),
            key=lambda job: (job.arrived / self.aging - job.priority, job.order),
        )

    def submit(self, job: ScheduledJob) -> None:
        """Add a request.

        Raises:
            RequestError: it can never fit, or its name is taken.
            BusyError: the queue is full.
        """
        if job.most > self.capacity:
            raise RequestError(
                f"the request needs memory for {job.most} tokens, and there is memory for "
                f"{self.capacity}; request fewer"
            )
        if job.id in self.jobs:
            raise RequestError(f"a request {job.id!r} is running; give this one another name")
        if len(self.jobs) - len(self._running) >= self.queue:
            raise BusyError(f"{self.queue} requests wait already; try again later")
        self._orders += 1
        job.order = self._orders
        if job.after not in self.jobs:  # never itself: there are no circles
            job.after = None
        if job.client not in self._clients:
            # A client that returns has no claim on the time of its absence.
            smallest = min((self._served[client] for client in self._clients), default=0.0)
            self._served[job.client] = max(self._served.get(job.client, 0.0), smallest)
        self._clients[job.client] += 1
        self.jobs[job.id] = job

    def plan(
        self,
        now: float,
        free: int,
        tokens: int,
        busy: Collection[str] = (),
        shares: int = 1,
    ) -> Plan:
        """Plan the next pass.

        Args:
            now: time on the caller's clock.
            free: positions of memory that can be had, besides what passes under way need.
            tokens: prompt tokens that the pass may carry.
            busy: requests in passes that are under way; they cannot be in this one.
            shares: number of passes that share the running requests; this one takes one share.
        """
        late = [job for job in self.jobs.values() if job.deadline is not None]
        expired = [job for job in late if job.deadline is not None and job.deadline <= now]
        for job in expired:
            free += int(job.rows * job.cost)
            self.finished(job.id)
        running = self.running
        free -= self._losses(running)
        preempted: list[ScheduledJob] = []
        # Every decoding request needs room for a root; otherwise the last one is preempted.
        while len(running) > 1 and free < _costs(
            job for job in running if not job.missing and job.id not in busy
        ):
            preempted.append(running.pop())
            free += self.preempt(preempted[-1].id) + self._losses(preempted[-1:])
        admitted = [] if preempted else self._admit(now, free, running)
        most = -(-(len(running) + len(admitted)) // shares)
        decoding = [job for job in running if not job.missing and job.id not in busy][:most]
        prefilling = sorted(
            (
                job
                for job in [*running, *admitted]
                if job.missing and not job.apart and job.id not in busy
            ),
            key=lambda job: (-self._level(job, now - job.arrived), job.missing, job.order),
        )
        free -= self._losses(admitted)
        parts = []
        for job in prefilling[: most - len(decoding)]:
            size = min(job.missing, tokens, int((free - _costs(decoding)) / job.cost))
            if size > 0:
                parts.append((job.id, size))
                tokens, free = tokens - size, free - ceil(size * job.cost)
        alone = not decoding and not busy
        if running and prefilling and not parts and alone:  # prompts occupy all memory
            preempted.append(running[-1])
            self.preempt(preempted[-1].id)
        return Plan(
            expired=[job.id for job in expired],
            preempted=[job.id for job in preempted],
            admitted=[job.id for job in admitted],
            parts=parts,
            decoding=[job.id for job in decoding],
            nodes=max(min(self.tree, int(free / _costs(decoding))), 1) if decoding else 1,
        )

    def ran(self, job_id: str, held: int, text: int, rows: int | None = None) -> None:
        """Record a request's progress after a pass or after its admission.

        Args:
            job_id: names it.
            held: tokens of its text that were run.
            text: tokens of its text.
            rows: those of `held` that take memory; None: all.
        """
        job = self.jobs[job_id]
        self._served[job.client] += max(held - job.reached, 0)
        job.reached = max(held, job.reached)
        job.held, job.text = held, text
        job.rows = held if rows is None else rows
        job.stage = "decoding" if not job.missing else "prompt"

    def preempt(self, job_id: str) -> int:
        """Put a running request back into the queue; return the positions that it held."""
        job = self._running.pop(job_id)
        rows, job.held, job.rows, job.stage = int(job.rows * job.cost), 0, 0, "waiting"
        job.apart = False
        return rows

    def finished(self, job_id: str) -> None:
        """Remove a request that has ended or was cancelled; unknown ones are ignored."""
        job = self.jobs.pop(job_id, None)
        self._running.pop(job_id, None)
        if not job:
            return
        self._clients[job.client] -= 1
        if not self._clients[job.client]:
            del self._clients[job.client]
        if len(self._served) + len(self._last_admitted) > 4 * self.queue + 2 * len(self._clients):
            self._served = {c: self._served[c] for c in self._clients}
            self._last_admitted = {
                key: at for key, at in self._last_admitted.items() if key[0] in self._clients
            }

    def _losses(self, jobs: Iterable[ScheduledJob]) -> int:
        """Return the positions that some requests may waste."""
        return int(self.loss * _costs(jobs))

    def _level(self, job: ScheduledJob, seconds: float) -> int:
        """Return its priority after `seconds` of waiting."""
        return job.priority + int(max(seconds, 0.0) / self.aging)

    def _waited(self, job: ScheduledJob, now: float) -> float:
        """Return the seconds since it arrived, or its client's last one with its priority ran."""
        return now - max(
            job.arrived, self._last_admitted.get((job.client, job.priority), job.arrived)
        )

    def _follows(self, job: ScheduledJob) -> bool:
        """Return whether it waits for another request to compute their common prefix."""
        other = self.jobs.get(job.after) if job.after else None
        return other is not None and other.stage != "decoding"

    def _admit(self, now: float, free: int, running: list[ScheduledJob]) -> list[ScheduledJob]:
        """Admit requests whose text fits next to what the running ones will need soon."""
        free -= int(sum((job.bounded(job.missing) + self.tree) * job.cost for job in running))
        full = len(running) >= self.max_running or (running and free <= self.tree)
        if full or len(self._running) == len(self.jobs):
            return []
        waiting = sorted(
            (job for job in self.waiting if not self._follows(job)),
            key=lambda job: (
                -self._level(job, self._waited(job, now)),
                self._served[job.client],
                job.order,
            ),
        )
        admitted: list[ScheduledJob] = []
        for job in waiting:
            free -= int((job.bounded(job.text) + self.tree + self.loss) * job.cost)
            alone = not running and not admitted
            # In order, so that small requests do not overtake a large one for ever.
            if len(running) + len(admitted) >= self.max_running or (free < 0 and not alone):
                break
            job.stage = "prompt"
            self._running[job.id] = job
            self._last_admitted[job.client, job.priority] = now
            admitted.append(job)
        return admitted


def _costs(jobs: Iterable[ScheduledJob]) -> float:
    """Return the positions of memory that one token of each request takes."""
    return sum(job.cost for job in jobs)


class BusyError(RequestError):
    """The queue is full."""
