"""The cost model of the planner: speed, memory and loss of a setup, from a few measurements.

A pass over n nodes beside S cached positions of each of U users takes

    T(n, S, U) = r(n) (T(n) + U * s * S)

with the measured curve T and the measured slope s, scaled by the size of the cache's format and by
the share of that time that an attention pattern leaves, measured at S. A drafter with a budget of b
nodes makes trees of n(b) nodes in the mean, gains A(b) tokens a pass and takes d seconds for each
user:

    tokens/s = A(b) / (T(1 + n(b), S, 1) + d + o)

where o is what the decoding loop takes besides. T is the shortest time of passes that were run for
it; how much longer the passes of answers take, r, is measured for plain passes and for full trees,
and interpolated between them. An automatic budget is as fast as the best of its choices would be,
times the share of that speed that it reached when it was measured.

Several users are scheduled as the server does it, pass by pass: see `batch_schedule`. r is then 1,
as such passes make all logits, like those of the curve, and o is what each text added to the plain
passes of a small batch.

A format that has not been measured takes its bytes over the memory bandwidth, or the curve of the
measured one scaled by the bytes. Memory is that of weights, keys and values, drafters, and the
logits of a pass. docs/guides/plan.md states what the model leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.engines.pages import PAGE
from paceline.planning.batch_schedule import MAX_STREAMS, StreamPass, batch_seconds, prompt_room
from paceline.planning.measured_facts import (
    MAX_NODES,
    READ_ALL,
    DraftFacts,
    EngineFacts,
    PromptFacts,
    ReadFacts,
)
from paceline.planning.setups import Goal, Setup


@dataclass(frozen=True)
class Forecast:
    """What the cost model says of a setup.

    Attributes:
        tokens_per_second: of all users together.
        first_token: seconds until the first token of a prompt of mean length.
        memory: bytes at the context and users of the goal.
        nodes: of a tree beyond its root.
    """

    tokens_per_second: float
    first_token: float
    memory: int
    nodes: int


@dataclass(frozen=True)
class Slowdown:
    """How many times as long the passes of answers take as those of the measured curve.

    Attributes:
        plain: of passes without drafts.
        full: of passes with the largest trees.
        nodes: beyond the root, of the largest trees.
    """

    plain: float = 1.0
    full: float = 1.0
    nodes: float = MAX_NODES

    @classmethod
    def of(
        cls, engine: EngineFacts, plain: DraftFacts, drafts: DraftFacts, prompts: PromptFacts
    ) -> Slowdown:
        """Return that of a drafter with the engine in which it was measured."""
        if engine.predicted or not plain.forward:
            return cls()
        cached = prompts.cached
        one = plain.forward / engine.pass_seconds(1, cached, 1, "auto")
        nodes = drafts.nodes[-1]
        if not (drafts.forward and nodes):
            return cls(one, one)
        full = drafts.forward / engine.pass_seconds(1 + nodes, cached, 1, "auto")
        return cls(one, full, nodes)

    def at(self, nodes: ArrayLike) -> NDArray[np.float64]:
        """Return that of trees with so many nodes beyond the root."""
        share = np.minimum(np.asarray(nodes, np.float64) / self.nodes, 1.0)
        return self.plain + (self.full - self.plain) * share


class AnswerPasses:
    """The passes of a setup in which users decode.

    Args:
        setup: the setup.
        engine: of its checkpoint, format and threads.
        drafts: of its drafter.
        slowdown: of passes against the engine's curve.
        cached: positions of each user's text that a pass reads.
        read: share of the time of cached positions that the attention pattern takes.
    """

    def __init__(
        self,
        setup: Setup,
        engine: EngineFacts,
        drafts: DraftFacts,
        slowdown: Slowdown,
        cached: float,
        read: float,
    ) -> None:
        largest = drafts.budget
        own = range(largest + 1) if setup.budget == "auto" else [min(int(setup.budget), largest)]
        self._budgets = np.array(own)  # further entries are of likely nodes alone
        likely = setup.budget == "auto"
        more = [drafts.likely_gained, drafts.likely_sizes] if likely else [(), ()]
        self._gained = np.append(np.array(drafts.gained)[self._budgets], more[0])
        self._nodes = np.append(np.array(drafts.nodes)[self._budgets], more[1])
        self._slower = slowdown.at(self._nodes)
        idle = np.append(self._budgets == 0, np.zeros(len(more[0]), bool))
        self._overhead, self._draft = drafts.overhead, np.where(idle, 0.0, drafts.seconds)
        self._engine = engine
        self._cached = engine.pass_seconds(0, cached, 1, setup.kv_format, read) - engine.at(0)

    def reaching(self, users: int, reached: float) -> StreamPass:
        """Return the best pass if drafts reach this share of their speed; a plain one may be it."""
        plain = StreamPass(float(self._seconds(users)[0]), float(self._gained[0]))
        best = self.best(users)[0]
        found = StreamPass(best.seconds / reached, best.gained)
        faster = found.gained / found.seconds > plain.gained / plain.seconds
        return found if faster else plain

    def _seconds(self, users: int) -> NDArray[np.float64]:
        """Return the times of a pass with each budget."""
        seconds = self._engine.at_each(users * (1 + self._nodes)) + users * self._cached
        if users == 1:
            return seconds * self._slower + self._overhead + self._draft
        return seconds + users * (self._engine.batch_overhead + self._draft)

    def best(self, users: int) -> tuple[StreamPass, int]:
        """Return the pass with the most tokens a second, and the best fixed budget of a tree."""
        seconds = self._seconds(users)
        speeds = self._gained / seconds
        at, fixed = int(np.argmax(speeds)), int(np.argmax(speeds[: len(self._budgets)]))
        found = StreamPass(float(seconds[at]), float(self._gained[at]))
        return found, int(self._budgets[fixed])


def forecast(
    setup: Setup,
    engine: EngineFacts,
    drafts: DraftFacts,
    prompts: PromptFacts,
    goal: Goal,
    slowdown: Slowdown = Slowdown(),
    reads: ReadFacts = READ_ALL,
    reached: float = 1.0,
) -> Forecast:
    """Return speed and memory of a setup.

    Args:
        setup: the setup.
        engine: of its checkpoint, format and threads.
        drafts: of its drafter.
        prompts: that are decoded.
        goal: gives context and users.
        slowdown: of passes against the engine's curve.
        reads: of its attention pattern.
        reached: share of the speed of its best trees for one user, as `share_reached` says.
    """
    cached, rows = prompts.cached, cache_rows(setup, prompts.context(goal))
    if setup.kv_policy is not None:
        cached = min(cached, rows)
    passes = AnswerPasses(setup, engine, drafts, slowdown, cached, reads.share)
    one, nodes = passes.best(1)
    if goal.users == 1:
        speed = reached * one.gained / one.seconds
    else:
        nodes = passes.best(min(goal.users, MAX_STREAMS))[1]
        seconds = batch_seconds(
            prompts.of_users(goal.users),
            prompts.answer,
            lambda users: passes.reaching(users, reached),
            engine.prefill,
            lambda streams: prompt_room(engine.nodes, engine.seconds, streams),
        )
        speed = goal.users * prompts.answer / seconds
    first = prompts.prompt * engine.prefill
    first += engine.pass_seconds(1, prompts.prompt, 1, setup.kv_format, reads.share)
    memory = memory_of(setup, engine, drafts, prompts, goal, reads)
    return Forecast(speed, first, memory, nodes)


def share_reached(
    setup: Setup,
    engine: EngineFacts,
    drafts: DraftFacts,
    prompts: PromptFacts,
    slowdown: Slowdown = Slowdown(),
) -> float:
    """Return the measured speed of an automatic budget over that of the best of its choices.

    It is below 1 as the budget must learn what pays, most so on short answers.

    Args:
        setup: in which it was measured.
        engine: of that setup.
        drafts: of its drafter.
        prompts: that were decoded.
        slowdown: of passes against the engine's curve.
    """
    if setup.budget != "auto" or not drafts.automatic or engine.predicted:
        return 1.0
    best = AnswerPasses(setup, engine, drafts, slowdown, prompts.cached, READ_ALL.share).best(1)[0]
    return best.seconds / best.gained / drafts.automatic


def cache_rows(setup: Setup, context: int) -> int:
    """Return the rows that a head of a user's cache holds at most."""
    if setup.kv_policy is None:
        return context
    from paceline.kvcache.base import parse_policy

    return parse_policy(setup.kv_policy).max_rows(context)


def memory_of(
    setup: Setup,
    engine: EngineFacts,
    drafts: DraftFacts,
    prompts: PromptFacts,
    goal: Goal,
    reads: ReadFacts = READ_ALL,
) -> int:
    """Return the bytes of weights, keys and values, drafters and the logits of a pass."""
    context = prompts.context(goal)
    nodes = MAX_NODES if setup.budget == "auto" else int(setup.budget)
    tree = 1 if setup.plain else nodes + 1
    pages = -(-(cache_rows(setup, context) + tree) // PAGE)
    page = engine.kv_bytes(setup.kv_format) + reads.page_bytes
    total = engine.weight_bytes + goal.users * pages * page
    total += 2 * goal.users * tree * engine.vocab_size * 4
    if not setup.plain:
        total += drafts.state_bytes + drafts.model_bytes
        total += goal.users * -(-context // PAGE) * drafts.page_bytes
    return total


def estimated_bytes(parameters: int, bits: float) -> int:
    """Return the bytes of so many weights in a format."""
    return round(parameters * bits / 8)
