"""Who runs in the next pass. A pure state machine: no engine, no clock, no I/O.

Every pass has the last token of each request that is decoding (with its tree), and as many tokens
of prompts as the pass may carry besides: continuous batching, Orca, OSDI 2022; chunked prefill
without stalls, Sarathi-Serve, arXiv 2403.02310. Several prompts share a pass without padding. Who
comes first is decided by priority, and among equals by the client that was served least (Virtual
Token Counter, arXiv 2401.00588). When memory runs out the latest of the least important gives its
place up, and is run anew later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from paceline.errors import RequestError

Stage = Literal["waiting", "prompt", "decoding"]


@dataclass(eq=False)
class ScheduledJob:
    """A request as the scheduler sees it.

    Attributes:
        id: names it; unique.
        text: tokens known so far, prompt and output.
        most: positions of memory that it may come to take.
        cost: positions of memory that a token takes, those of guides included.
        client: whose it is; clients get equal shares.
        priority: larger is more urgent.
        deadline: on the caller's clock; past it the request is given up. None has all the time.
        arrived: on the caller's clock.
        after: another request, which begins alike: until that decodes this one waits.
        held: tokens of the text that are in the engine's memory.
        stage: where it stands.
        order: counts submissions.
        reached: most tokens that it ever held; what is run anew is not its client's debt.
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
    stage: Stage = "waiting"
    order: int = 0
    reached: int = 0

    @property
    def missing(self) -> int:
        """Tokens to run before it can decode; the last one is the first tree's root."""
        return self.text - 1 - self.held


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens before and in the next pass, in this order.

    Attributes:
        expired: requests past their deadline; they are gone.
        preempted: requests that give their memory up, and wait again.
        admitted: requests that get a place.
        parts: request and number of its missing tokens to run.
        decoding: requests that get a tree, of at most `nodes` nodes with its root.
        nodes: so many.
    """

    expired: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    parts: list[tuple[str, int]] = field(default_factory=list)
    decoding: list[str] = field(default_factory=list)
    nodes: int = 1


class Scheduler:
    """Decides; the caller runs, and tells what came of it.

    Args:
        max_running: most requests that run at once.
        capacity: positions that the engine's memory holds.
        queue: most requests that wait.
        aging: seconds of waiting that weigh as much as one step of priority: nobody starves. Of a
            client's requests with one priority only the first gets older, so that many of them do
            not outweigh another client's few.
        tree: most nodes of a tree, for which memory is kept.
        loss: positions that a request may waste besides those it holds: memory comes in pages.
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
        self._placed: dict[str, ScheduledJob] = {}
        self._clients: Counter[str] = Counter()  # of `jobs`
        self._served: dict[str, float] = {}  # client -> tokens
        self._turns: dict[tuple[str, int], float] = {}  # client, priority -> last admission
        self._orders = 0

    @property
    def waiting(self) -> list[ScheduledJob]:
        """Those without a place, in the order of their arrival."""
        return [job for job in self.jobs.values() if job.stage == "waiting"]

    @property
    def running(self) -> list[ScheduledJob]:
        """Those with a place, the most important first."""
        # All get older alike, so this order is for ever: the first is never preempted, and ends.
        return sorted(
            self._placed.values(),
            key=lambda job: (job.arrived / self.aging - job.priority, job.order),
        )

    def submit(self, job: ScheduledJob) -> None:
        """A new request.

        Raises:
            RequestError: it can never fit, or its name is taken.
            BusyError: the queue is full; later it may not be.
        """
        if job.most > self.capacity:
            raise RequestError(
                f"the request needs memory for {job.most} tokens, and there is some for "
                f"{self.capacity}; ask for fewer"
            )
        if job.id in self.jobs:
            raise RequestError(f"a request {job.id!r} is under way; give this one another name")
        if len(self.jobs) - len(self._placed) >= self.queue:
            raise BusyError(f"{self.queue} requests wait already; try again later")
        self._orders += 1
        job.order = self._orders
        if job.after not in self.jobs:  # never itself, so that nobody waits in a circle
            job.after = None
        if job.client not in self._clients:
            # Who comes back has no claim on the time that it was away.
            least = min((self._served[client] for client in self._clients), default=0.0)
            self._served[job.client] = max(self._served.get(job.client, 0.0), least)
        self._clients[job.client] += 1
        self.jobs[job.id] = job

    def plan(self, now: float, free: int, tokens: int) -> Plan:
        """The next pass.

        Args:
            now: on the caller's clock.
            free: positions of memory that can be had.
            tokens: of prompts that the pass may carry.
        """
        late = [job for job in self.jobs.values() if job.deadline is not None]
        expired = [job for job in late if job.deadline is not None and job.deadline <= now]
        for job in expired:
            free += int(job.held * job.cost)
            self.finished(job.id)
        running = self.running
        free -= self._losses(running)
        preempted: list[ScheduledJob] = []
        # A root for every request that decodes, or the last gives up.
        while len(running) > 1 and free < _costs(job for job in running if not job.missing):
            preempted.append(running.pop())
            free += self.preempt(preempted[-1].id) + self._losses(preempted[-1:])
        decoding = [job for job in running if not job.missing]
        admitted = [] if preempted else self._admit(now, free, running)
        begun = sorted(
            (job for job in [*running, *admitted] if job.missing),
            key=lambda job: (-self._level(job, now - job.arrived), job.missing, job.order),
        )
        free -= self._losses(admitted)
        parts = []
        for job in begun:
            size = min(job.missing, tokens, int((free - _costs(decoding)) / job.cost))
            if size > 0:
                parts.append((job.id, size))
                tokens, free = tokens - size, free - ceil(size * job.cost)
        if running and begun and not parts and not decoding:  # prompts hold all memory
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

    def ran(self, job_id: str, held: int, text: int) -> None:
        """Where a request stands after a pass, or when it has got its place."""
        job = self.jobs[job_id]
        self._served[job.client] += max(held - job.reached, 0)
        job.reached = max(held, job.reached)
        job.held, job.text = held, text
        job.stage = "decoding" if not job.missing else "prompt"

    def preempt(self, job_id: str) -> int:
        """Let a request wait again; returns the positions that it held."""
        job = self._placed.pop(job_id)
        held, job.held, job.stage = int(job.held * job.cost), 0, "waiting"
        return held

    def finished(self, job_id: str) -> None:
        """A request is over, or no longer wanted. One that is not known is over already."""
        job = self.jobs.pop(job_id, None)
        self._placed.pop(job_id, None)
        if not job:
            return
        self._clients[job.client] -= 1
        if not self._clients[job.client]:
            del self._clients[job.client]
        if len(self._served) + len(self._turns) > 4 * self.queue + 2 * len(self._clients):
            self._served = {c: self._served[c] for c in self._clients}
            self._turns = {key: at for key, at in self._turns.items() if key[0] in self._clients}

    def _losses(self, jobs: Iterable[ScheduledJob]) -> int:
        """Positions that some requests may waste."""
        return int(self.loss * _costs(jobs))

    def _level(self, job: ScheduledJob, seconds: float) -> int:
        """Its priority after so many seconds of waiting."""
        return job.priority + int(max(seconds, 0.0) / self.aging)

    def _waited(self, job: ScheduledJob, now: float) -> float:
        """Seconds since it, or one of its client's with its priority, had a chance."""
        return now - max(job.arrived, self._turns.get((job.client, job.priority), job.arrived))

    def _follows(self, job: ScheduledJob) -> bool:
        """Whether another request is to run what they have in common first."""
        other = self.jobs.get(job.after) if job.after else None
        return other is not None and other.stage != "decoding"

    def _admit(self, now: float, free: int, running: list[ScheduledJob]) -> list[ScheduledJob]:
        """Who gets a place: those whose text fits beside what the running ones will need soon."""
        free -= int(sum((job.missing + self.tree) * job.cost for job in running))
        full = len(running) >= self.max_running or (running and free <= self.tree)
        if full or len(self._placed) == len(self.jobs):
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
            free -= int((job.text + self.tree + self.loss) * job.cost)
            alone = not running and not admitted
            # In order: a large one that must wait is not overtaken for ever by small ones.
            if len(running) + len(admitted) >= self.max_running or (free < 0 and not alone):
                break
            job.stage = "prompt"
            self._placed[job.id] = job
            self._turns[job.client, job.priority] = now
            admitted.append(job)
        return admitted


def _costs(jobs: Iterable[ScheduledJob]) -> float:
    """Positions of memory that a token of each takes."""
    return sum(job.cost for job in jobs)


class BusyError(RequestError):
    """Too many requests wait already."""
