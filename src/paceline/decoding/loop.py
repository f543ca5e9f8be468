"""The decoding loop of one request: draft, forward, walk, commit. `serving` runs many at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from time import perf_counter
from typing import Any

from paceline.compatibility import Side, check
from paceline.core import Output, Request
from paceline.decoding.governor import Budget, Fixed, Governor
from paceline.decoding.session import Session, give_hidden
from paceline.decoding.text_stream import TextStream
from paceline.drafters.base import Drafter, ModelBacked
from paceline.engines.base import Cached, Engine, Rows
from paceline.engines.page_store import PageStore
from paceline.engines.screened import coarse
from paceline.errors import MemoryFullError, MethodError

_SOON = 4  # passes of a request before which no draft is not called a rest
_RECENT = 128  # tokens that a draft model reads after a rest in which more were drawn


class Generation:
    """A running request. Iterating yields the text as soon as it is final.

    `output` is complete when the iteration has ended. A `KeyboardInterrupt` ends it with
    `finish == "interrupted"` and the text so far.

    Args:
        engine: runs the model.
        drafter: proposes trees; it keeps what it learns.
        request: what to generate.
        budget: decides how many nodes below the root each tree may have.
        stream: turns tokens into text and finds stop strings; None when only tokens matter.
        margins: record `Output.margins`, for `measuring.proof`.
        sequence: holds a prefix of the prompt, and is released at the end; None opens a new one.
        pages: stores prefixes on disk: the longest stored one of the prompt is read instead of
            computed, and the prompt is stored. None, a given `sequence`, a KV policy and documents
            do without.
        lock: held while the engine and the drafter are used, and not while text is handed out;
            None where one thread uses them.

    Raises:
        RequestError: empty prompt, prompt too long, token outside the vocabulary, bad number.
        MethodError: the request's walk cannot follow this drafter or this budget.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        request: Request,
        budget: Budget,
        stream: TextStream | None = None,
        margins: bool = False,
        sequence: Cached | None = None,
        pages: PageStore | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._lock = nullcontext() if lock is None else lock
        rejects = follows_rejection(request, drafter, budget)
        self._session = Session(engine, drafter, request, stream, margins, rejects)
        self._engine, self._budget, self._sequence = engine, budget, sequence
        self._rested = False  # whether the drafter drafted nothing for the last pass
        self._recording = 0.0  # seconds that the budget's last `record` took
        self._adaptive = self._delayed = False  # whether only the first token's time was in the way
        self._pages = pages if sequence is None and not request.own_cache else None
        self.output = self._session.output

    def __iter__(self) -> Iterator[str]:
        return self._passes(every=False)

    def steps(self) -> Iterator[str]:
        """Yield after the prompt and after each pass: its text, which may be empty."""
        return self._passes(every=True)

    def _passes(self, every: bool) -> Iterator[str]:
        session = self._session
        try:
            with self._lock:
                self._prefill()
            if every:
                yield ""
            while not session.done:
                with self._lock:
                    text = self._step()
                if text or every:
                    yield text
        except KeyboardInterrupt:
            self.output.finish = "interrupted"
        finally:
            with self._lock:
                session.close()

    def run(self) -> Output:
        """Run to the end; return the output."""
        for _ in self:
            pass
        return self.output

    def _prefill(self) -> None:
        session, start = self._session, perf_counter()
        session.open(self._sequence)
        self._load_pages()
        session.load_documents()
        while session.missing:
            tree = session.next_part()
            assert session.active is not None
            rows: Rows = "all" if session.wants_prefill_logits else "none"
            logits = self._engine.forward_screened([(session.active, tree)], rows)
            session.commit_part(tree, coarse(logits))
            session.load_documents()
        if self._pages is not None and session.sequence is not None:
            self._pages.save(session.text, session.sequence)
        # Under an adaptive budget the first pass is plain, so that no drafter delays its token.
        self._adaptive = not isinstance(self._budget, Fixed)
        self._rested = self._adaptive or not self._budget.nodes_wanted()
        if not self._rested:
            self._read_all()
        session.begin_guides()
        self.output.seconds.prefill = perf_counter() - start

    def _load_pages(self) -> None:
        """Read the stored beginning of the prompt, unless computing it is faster."""
        sequence, text = self._session.sequence, self._session.text
        if self._pages is None or sequence is None:
            return
        cost = self._budget.cost if isinstance(self._budget, Governor) else None
        self.output.cached_tokens = self._pages.load(text[:-1], sequence, cost)

    def _step(self) -> str:
        """Run one pass: draft, forward, walk, commit, learn. Return its text."""
        session, budget = self._session, self._budget
        assert session.sequence is not None
        nodes = budget.nodes_wanted() if session.levels else 0
        if self._adaptive and not self.output.passes:
            self._delayed, nodes = bool(nodes), 0
        woken = self._wake() if nodes and self._rested else 0.0
        self._rested = not nodes
        start = perf_counter()
        tree = session.propose(
            nodes, 0 if nodes else budget.nodes_for_forced(), budget.min_path_prob()
        )
        if nodes:
            [tree] = budget.prune([tree], perf_counter() - start)
        drafted = perf_counter()
        session.run_guides(tree)
        looked = perf_counter() if session.guides else drafted
        forward = self._engine.forward_screened if session.can_screen else self._engine.forward
        logits = forward([(session.sequence, tree)])
        give_hidden(self._engine, [session], [len(tree)])
        passed = perf_counter()
        walked = session.verify(tree, logits)
        learning = perf_counter()
        session.learn(tree, logits, walked)
        draft = 0.0
        learnt = perf_counter()
        if len(tree) > 1 or nodes:  # what the budget took to record the last pass is part of it
            draft = drafted - start + learnt - learning + self._recording
        budget.record([tree], [walked.path], draft, passed - drafted)
        self._recording = perf_counter() - learnt
        seconds = self.output.seconds
        seconds.draft += draft + woken
        seconds.guide += looked - drafted
        seconds.forward += passed - looked
        seconds.walk += learning - passed
        seconds.decode += perf_counter() - start + woken
        return "".join(session.accept(tree, walked))

    def _read_all(self) -> None:
        """Let the drafter read all of the text."""
        self._session.read_prompt()
        with suppress(MemoryFullError):  # without room, nothing is drafted
            if isinstance(self._session.drafter, ModelBacked):
                self._session.drafter.follow(self._session.text)

    def _wake(self) -> float:
        """Let a drafter read what it needs after plain passes; return the seconds it took.

        After a rest this is a loss that drafting has to make up for; before the first draft of a
        request it is not, unless drafting has not paid lately.
        """
        drafter, start = self._session.drafter, perf_counter()
        delayed, self._delayed = self._delayed, False
        trial = isinstance(self._budget, Governor) and self._budget.doubtful
        if delayed and not trial and self.output.passes <= _SOON:
            self._read_all()
            return perf_counter() - start
        self._session.read_prompt()
        with suppress(MemoryFullError):
            if isinstance(drafter, ModelBacked):
                drafter.follow_recent(self._session.text, _RECENT)
        seconds = perf_counter() - start
        self._budget.charge(seconds)
        return seconds


def follows_rejection(request: Request, drafter: Drafter, budget: Budget) -> bool:
    """Return whether the request uses the rejection walk.

    Raises:
        MethodError: it asks for one, which the drafter or the budget does not allow.
    """
    if request.walk == "gumbel" or (request.walk == "rejection" and request.temperature == 0):
        return False  # greedy decoding has one walk
    if request.walk != "rejection":
        raise MethodError(f"the walk is {request.walk!r}, expected gumbel or rejection")
    sides = {Side.REJECTION: "the rejection walk"}
    known = isinstance(drafter, ModelBacked) and drafter.has_draft_probs
    if drafter.rollback is not None or not known:
        sides[Side.PROBABILITY_FREE_DRAFTER] = f"the drafter {', '.join(drafter.origins)}"
    if not isinstance(budget, Fixed):
        sides[Side.ADAPTIVE_BUDGET] = "the budget auto"
    check(sides)
    return True
