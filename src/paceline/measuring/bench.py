"""Speed against plain decoding, measured so that the comparison is fair.

Arms take turns on every prompt in rotating order. All arms decode the same prompts to the same
number of tokens. The time of every arm is compared with that of plain decoding on the same
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from paceline.compatibility import Side, check
from paceline.core import Cost, Request, Seconds
from paceline.decoding.governor import Budget, Fixed, Governor
from paceline.decoding.loop import follows_rejection
from paceline.decoding.text_stream import pieces_of
from paceline.drafters.base import Drafter, DraftMethod
from paceline.engines.cost import context_for, measure_cost
from paceline.engines.cost_cache import cost_of
from paceline.lm import LM
from paceline.measuring.bandwidth import Bandwidth, bytes_per_token, measure_bandwidth
from paceline.measuring.baseline import (
    BaselineTurn,
    TurnOptions,
    decode,
    plain_drafter,
    plain_turns,
)
from paceline.measuring.calibration import Reliability
from paceline.measuring.memory import MemoryUse, measure_memory, state_bytes
from paceline.measuring.prompts import Dialogue
from paceline.measuring.recording import TracedToken, recording_budget, trace
from paceline.measuring.statistics import Interval, Ratio, median_interval, total_ratio

PLAIN = "plain"
State = Literal["carried", "reset"]
STATES: tuple[State, ...] = ("carried", "reset")


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One answer by one arm; `identical` to that of plain decoding."""

    seconds: Seconds
    tokens: int
    passes: int
    nodes: int
    identical: bool

    def decoding(self) -> float:
        """Return the seconds of decoding, without the prefill."""
        return self.seconds.decode

    def whole(self) -> float:
        """Return the seconds from the prompt to the last token."""
        return self.seconds.prefill + self.seconds.decode


@dataclass(slots=True)
class Arm:
    """A drafter with a budget, and its runs: for each turn, by name, one run per round.

    Attributes:
        name: of the arm, e.g. `recycle@16`.
        spec: text that named the drafter.
        budget: largest number of nodes of a tree beyond its root, or `auto`.
        drafter: with what it has learnt.
        sizes: the budget in use.
        state: `reset` before every prompt, or `carried` from prompt to prompt.
        walk: by which it draws. Outputs of the rejection walk have the distribution of plain
            decoding, but other tokens.
        reliability: of the drafter's scores, over all runs.
        traced: tokens of the last answer to the traced prompt.
        bytes: size of what the drafter had learnt at the end of a round, the largest.
    """

    name: str
    spec: str
    budget: int | str
    drafter: Drafter
    sizes: Budget
    state: State = "carried"
    walk: str = "gumbel"
    runs: dict[str, list[ArmRun]] = field(default_factory=dict)
    reliability: Reliability = field(default_factory=Reliability)
    traced: list[TracedToken] = field(default_factory=list)
    bytes: int = 0

    def reset(self, cost: Cost) -> None:
        """Forget what the drafter and the governor have learnt."""
        self.drafter.reset()
        self.sizes = sizing(self.budget, cost)

    def request(self, turn: BaselineTurn) -> Request:
        """Return the turn's request with this arm's walk."""
        return replace(turn.request, walk=self.walk)

    def seconds(
        self, turn: BaselineTurn, what: Callable[[ArmRun], float] = ArmRun.decoding
    ) -> float:
        """Return the median time of a turn, in seconds."""
        return median(map(what, self.runs[turn.name]))

    def tokens_per_second(self, turns: Sequence[BaselineTurn]) -> float:
        """Return the decoding speed, the median over `turns`."""
        return median(self.runs[turn.name][0].tokens / self.seconds(turn) for turn in turns)

    def total_tokens_per_second(self, turns: Sequence[BaselineTurn]) -> float:
        """Return the decoding speed: all tokens over all seconds."""
        tokens = sum(self.runs[turn.name][0].tokens for turn in turns)
        return tokens / sum(map(self.seconds, turns))


@dataclass(frozen=True, slots=True)
class Bench:
    """All measurements of a bench.

    Attributes:
        turns: the prompts with their plain answers.
        arms: plain decoding first.
        cost: T(n), seconds of a pass over n nodes.
        cost_context: committed positions at which it was measured.
        bandwidth: of memory, with as many threads as the engine has.
        bytes_per_token: bytes that plain decoding reads for a token; None if unknown.
        memory: used by the process, the weights and the longest cache.
    """

    turns: list[BaselineTurn]
    arms: list[Arm]
    cost: Cost
    cost_context: int
    bandwidth: Bandwidth
    bytes_per_token: int | None
    memory: MemoryUse

    @property
    def traced(self) -> BaselineTurn:
        """The prompt whose tokens are traced: the middle one, so that none is hand-picked."""
        return middle(self.turns)

    @property
    def share(self) -> float | None:
        """Share of the memory bandwidth that plain decoding reaches; None if unknown."""
        if self.bytes_per_token is None:
            return None
        rate = self.arms[0].tokens_per_second(self.turns)
        return self.bytes_per_token * rate / self.bandwidth.bytes_per_second

    def ratio(
        self, arm: Arm, turns: Sequence[BaselineTurn], what: Callable[[ArmRun], float]
    ) -> Interval:
        """Return how many times faster than plain an arm is: median over `turns`, paired by turn.

        Args:
            arm: the arm.
            turns: some of those that were measured.
            what: seconds of a run that count, `ArmRun.decoding` or `ArmRun.whole`.
        """
        plain = self.arms[0]
        return median_interval([plain.seconds(t, what) / arm.seconds(t, what) for t in turns])

    def total_ratio(self, arm: Arm, turns: Sequence[BaselineTurn]) -> Ratio:
        """Return the ratio of the totals: plain seconds over this arm's, of all `turns`."""
        plain = self.arms[0]
        return total_ratio([plain.seconds(t) for t in turns], [arm.seconds(t) for t in turns])


def middle(turns: Sequence[BaselineTurn]) -> BaselineTurn:
    """Return the turn in the middle."""
    return turns[len(turns) // 2]


def bench(
    lm: LM,
    methods: Mapping[str, DraftMethod],
    dialogues: Sequence[Dialogue],
    options: TurnOptions,
    budgets: Sequence[int | str],
    repeat: int = 3,
    states: Sequence[State] = ("carried",),
    progress: Callable[[], None] = lambda: None,
) -> Bench:
    """Measure every drafter at every budget, plain decoding, T(n) and the memory bandwidth.

    Every round goes over all prompts once and starts from drafters that have learnt nothing, so
    that none profits from having seen the answer to a prompt in an earlier round.

    Args:
        lm: gives engine and tokenizer.
        methods: drafters by name; plain decoding is always added.
        dialogues: the prompts.
        options: of every turn; `ignore_eos` makes all answers equally long.
        budgets: largest numbers of nodes beyond the root, or `auto`; one arm for each and drafter.
        repeat: number of rounds.
        states: whether drafters keep what they learn from prompt to prompt, or are reset before
            each; one arm for each.
        progress: called after each turn of the preparation and of each round.

    Raises:
        MethodError: the requested walk cannot follow a drafter, a budget or a grammar.
    """
    # Governors use this curve; the one below, at a longer context, is reported.
    known = cost_of(lm.engine) if "auto" in budgets else None
    arms = list(_arms(lm, methods, options, budgets, states, known))
    turns = []
    for turn in plain_turns(lm, dialogues, options):
        turns.append(turn)
        progress()
    cost = measure_cost(lm.engine)
    for arm in arms:
        arm.runs = {turn.name: [] for turn in turns}
        decode(lm, arm.drafter, arm.request(turns[0]), arm.sizes)  # warm-up, not counted
    for round_ in range(repeat):
        for arm in arms:
            arm.reset(cost)
        for number, turn in enumerate(turns):
            first = (number + round_) % len(arms)
            for arm in arms[first:] + arms[:first]:
                if arm.state == "reset":
                    arm.reset(cost)
                arm.runs[turn.name].append(_run(lm, arm, turn, turn is middle(turns)))
            progress()
        for arm in arms:
            arm.bytes = max(arm.bytes, state_bytes(arm.drafter))
    return _with_machine(lm, turns, arms, cost)


def sizing(budget: int | str, cost: Cost | None) -> Budget:
    """Return what sizes trees: a number of nodes, or a governor, which needs the cost."""
    if isinstance(budget, int):
        return Fixed(budget)
    assert cost is not None
    return Governor(cost)


def _arms(
    lm: LM,
    methods: Mapping[str, DraftMethod],
    options: TurnOptions,
    budgets: Sequence[int | str],
    states: Sequence[State],
    cost: Cost | None,
) -> Iterator[Arm]:
    plain = Arm(PLAIN, PLAIN, 0, plain_drafter(lm), Fixed(0))
    request = Request((), options.max_new_tokens, options.temperature, walk=options.walk)
    follows_rejection(
        replace(request, temperature=0.0), plain.drafter, plain.sizes
    )  # refuses an unknown walk
    yield plain
    for name, method, state in [(*item, state) for item in methods.items() for state in states]:
        for budget in budgets if name != PLAIN else ():
            drafter, sizes = method.build(lm.draft_target), sizing(budget, cost)
            walk = "rejection" if follows_rejection(request, drafter, sizes) else "gumbel"
            if walk == "rejection" and not options.ignore_eos:
                timing = "a comparison of times under a grammar"
                check({Side.REJECTION: "the rejection walk", Side.TIMING: timing})
            title = f"{name}@{budget}" + (f" {state}" if len(states) > 1 else "")
            yield Arm(title, name, budget, drafter, sizes, state, walk)


def _run(lm: LM, arm: Arm, turn: BaselineTurn, traced: bool = False) -> ArmRun:
    seen = recording_budget(arm.sizes)
    output = decode(lm, arm.drafter, arm.request(turn), seen)
    arm.reliability.learn(seen.passes)
    if traced:
        pieces = pieces_of(turn.request, lm.tokenizer)
        arm.traced = trace(seen.passes, output.tokens, arm.drafter.origins, pieces)
    same = output.tokens == turn.plain.tokens
    return ArmRun(output.seconds, len(output.tokens), output.passes, output.nodes, same)


def _with_machine(lm: LM, turns: list[BaselineTurn], arms: list[Arm], cost: Cost) -> Bench:
    seen = [len(turn.request.prompt) + len(turn.plain.tokens) / 2 for turn in turns]
    longest = max(((*turn.request.prompt, *turn.plain.tokens) for turn in turns), key=len)
    return Bench(
        turns,
        arms,
        cost,
        context_for(lm.engine),
        measure_bandwidth(lm.engine.threads),
        bytes_per_token(lm.engine, sum(seen) / len(seen)),
        measure_memory(lm.engine, longest),
    )
