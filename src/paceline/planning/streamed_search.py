"""Setups whose weights stream from disk: what memory leaves for weights, times and budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from paceline.engines.pages import PAGE
from paceline.planning.candidates import STORED
from paceline.planning.known_facts import PLAIN, SourceFacts
from paceline.planning.lab import Lab
from paceline.planning.measured_facts import (
    MAX_NODES,
    NO_DRAFTS,
    DraftFacts,
    EngineFacts,
    PromptFacts,
)
from paceline.planning.setups import Goal, Setup

_BUDGETS = (4, 8, 16, 32, 64, 128)  # nodes beyond the root
_DEEP_DRAFTERS = 3  # whose acceptance in large trees is measured
_WORTH = 3.0  # plain passes that a pass with the largest trees may take
_DRAFTER_BYTES = 16_000_000  # of what a drafter has learnt, until it is measured
_LEARNT, _MIN_LEARNT = 2, 4_000_000  # times what is measured, as it goes on learning; at least


@dataclass
class StreamedSearch:
    """Measures the model as it is stored with as much of its weights in memory as a goal allows.

    A pass takes as long as the disk, whatever it computes meanwhile, so that large trees pay. Their
    logits take memory, which is then missing for weights: a budget of nodes is given, never `auto`.

    Attributes:
        goal: with its memory, context and users.
        source: the model.
        lab: measures.
        prompts: that speed is about.
        largest: nodes of the largest trees that may pay; None: nothing was measured.
        deep: what drafters gain with them.
    """

    goal: Goal
    source: SourceFacts
    lab: Lab
    prompts: PromptFacts
    largest: int | None = None
    deep: dict[str, DraftFacts] = field(default_factory=dict)
    _measured: dict[int, EngineFacts] = field(default_factory=dict)  # by budget
    _base: int = 0  # budget of which all others are estimated

    def weights_memory(
        self, nodes: int = MAX_NODES, drafts: DraftFacts | None = None
    ) -> int | None:
        """Return the bytes that the goal leaves for weights; None where all fit, or none.

        Args:
            nodes: of a tree beyond its root; 0: nothing is drafted.
            drafts: of the drafter; None allows for a large one.
        """
        source, goal = self.source, self.goal
        if goal.memory is None:
            return None
        rows = self.prompts.context(goal) + nodes + 1
        rest = goal.users * -(-rows // PAGE) * source.page_bytes["fp32"]
        rest += 2 * goal.users * (nodes + 1) * source.vocab_size * 4  # logits
        rest += self._drafter_bytes(drafts) if nodes else 0
        left = goal.memory - rest
        return left if 0 < left < source.stored_bytes else None

    def _drafter_bytes(self, drafts: DraftFacts | None) -> int:
        """Return the memory that a drafter may take."""
        if drafts is None:
            return _DRAFTER_BYTES
        pages = self.goal.users * -(-self.prompts.context(self.goal) // PAGE)
        learnt = max(_LEARNT * drafts.state_bytes, _MIN_LEARNT)
        return learnt + drafts.model_bytes + pages * drafts.page_bytes

    @property
    def possible(self) -> bool:
        """Return whether the goal asks for it."""
        return self.weights_memory(0) is not None

    def measure(self) -> None:
        """Measure T(n) with what is left beside usual trees, and beside the largest useful ones."""
        for nodes in (MAX_NODES, *_BUDGETS[1::-1], 0):
            if self._measure(nodes):
                self._base = self.largest = nodes
                break
        else:
            return
        base = self._measured[self._base]
        for nodes in reversed(_BUDGETS):
            if nodes <= self._base:
                break
            if base.at(1 + nodes) <= _WORTH * base.at(1) and self._measure(nodes):
                self.largest = nodes
                break

    def measure_drafts(self, known: Mapping[str, DraftFacts]) -> None:
        """Measure what the most promising drafters gain with the largest trees.

        Args:
            known: what drafters gain with usual ones.
        """
        if self.largest is None or self.largest <= MAX_NODES:
            return
        base = self._measured[self._base]

        def speed(name: str) -> float:
            facts = known[name]
            return facts.gained[-1] / (base.at(1 + facts.nodes[-1]) + facts.seconds)

        names = sorted((name for name in known if name != PLAIN), key=speed, reverse=True)
        for name in names[:_DEEP_DRAFTERS]:
            facts = self.lab.drafts(name, self.largest)
            if facts is not None:
                self.deep[name] = facts

    def complete(self, stored: EngineFacts | None) -> None:
        """Bring all times to the speed that the disk has now.

        Args:
            stored: facts with all weights in memory: cached positions take as long as there.
        """
        if self.largest is None:
            return
        weights = self.weights_memory(self._base)
        now = 0.0 if weights is None else self.lab.streamed_pass(weights)
        base = self._measured[self._base].at(1)
        slope = 0.0 if stored is None else stored.slope
        for nodes, facts in self._measured.items():
            at_once = facts.with_pass(facts.at(1) * now / base)
            self._measured[nodes] = replace(at_once, slope=slope)
        if stored is not None:
            now = stored.reference
            self.deep = {name: each.timed(now) for name, each in self.deep.items()}

    def setups(
        self, drafts: Mapping[str, DraftFacts]
    ) -> Iterator[tuple[Setup, EngineFacts, DraftFacts]]:
        """Yield setups with their facts.

        Args:
            drafts: what drafters gain with usual trees.
        """
        if self.largest is None:
            return
        for name in [PLAIN, *(name for name in drafts if name != PLAIN)]:
            facts = self.deep.get(name) or drafts.get(name, NO_DRAFTS)
            budgets = [0] if name == PLAIN else [n for n in _BUDGETS if n <= facts.budget]
            for nodes in budgets:
                weights = self.weights_memory(nodes, facts)
                if weights is not None and nodes <= self.largest:
                    setup = Setup(
                        self.source.path, drafter=name, budget=nodes, weights_memory=weights
                    )
                    yield setup, self._facts(nodes, weights), facts

    def _measure(self, nodes: int) -> bool:
        weights = self.weights_memory(nodes)
        if weights is None:
            return False
        facts = self.lab.engine(self.source.path, STORED, None, weights)
        if facts is None or not facts.streamed:
            return False
        self._measured[nodes] = facts
        return True

    def _facts(self, nodes: int, weights: int) -> EngineFacts:
        return self._measured.get(nodes, self._measured[self._base]).with_weights(weights)
