"""Draft, forward, walk, commit. The only place that knows both engines and drafters."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np

from paceline import _native
from paceline.control.base import Filtering
from paceline.core import Floats, Output, Request, Step, Tokens, TokenTree
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.lenient import lenient_walk
from paceline.decoding.rejection import rejection_walk
from paceline.decoding.text import TextStream
from paceline.decoding.walk import Walked, walk
from paceline.drafters.base import Drafter
from paceline.engines.base import Cached, Engine
from paceline.errors import MethodError, RequestError

# Prompt logits that a learning drafter looks at are made in pieces of at most this many floats.
_PREFILL_LOGITS = 1 << 23


class Generation:
    """One request under way. Iterating gives the text as it becomes certain.

    `output` is complete when the iteration has ended, also by `close()`; a `KeyboardInterrupt`
    ends it with `finish == "interrupted"` and what there is.

    Args:
        engine: runs the model.
        drafter: guesses; what it has learnt stays with it.
        request: what is asked for.
        budget: how many nodes beyond the root each tree may have.
        stream: turns tokens into text and finds stop strings; None when only tokens matter.
        margins: record how near each draw was, for `measuring.proof`.

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
    ) -> None:
        check_request(engine, request)
        self._rejects = _rejects(request, drafter, budget)
        # The rejection walk needs every guess that was drawn, in vain or not.
        filters = [c for c in request.controls if isinstance(c, Filtering)]
        self._filters = [] if self._rejects else filters
        self.output = Output()
        self._engine, self._drafter, self._request = engine, drafter, request
        self._budget, self._stream, self._margins = budget, stream, margins
        room = engine.config.context - len(request.prompt)
        self._limit = min(request.max_new_tokens, room)
        self._history = list(request.prompt)
        self._tokens = np.zeros(len(request.prompt) + self._limit, np.int32)
        self._tokens[: len(request.prompt)] = request.prompt
        self.output.finish = "length" if self._limit == request.max_new_tokens else "context"

    def __iter__(self) -> Iterator[str]:
        sequence = None
        try:
            sequence = self._prefill()
            yield from self._decode(sequence)
        except KeyboardInterrupt:
            self.output.finish = "interrupted"
        finally:
            if sequence is not None:
                self._engine.release(sequence)

    def run(self) -> Output:
        """The whole output at once."""
        for _ in self:
            pass
        return self.output

    def _prefill(self) -> Cached:
        prompt = self._tokens[: len(self._request.prompt)]
        start = perf_counter()
        self._drafter.begin(self._request)

        def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
            drawn = prompt[offset + 1 : offset + 1 + len(tree)]
            nodes = np.arange(len(tree), dtype=np.int32)
            self._learn(prompt[: offset + 1], tree, logits, nodes, drawn)

        chunk = min(256, max(16, _PREFILL_LOGITS // self._engine.config.vocab_size))
        learns = self._drafter.learns_from_prompt
        # The last token is the first root: its row is made by the first pass.
        sequence = self._engine.start(prompt[:-1], observe if learns else None, chunk)
        self._drafter.attach(sequence)
        self.output.seconds.prefill = perf_counter() - start
        return sequence

    def _decode(self, sequence: Cached) -> Iterator[str]:
        start = perf_counter()
        while len(self.output.tokens) < self._limit:
            tree, walked = self._step(sequence)
            self.output.seconds.decode += perf_counter() - start
            text, done = self._accept(tree, walked)
            if text:
                yield text
            if done:
                return
            start = perf_counter()
        if self._stream:
            tail = self._stream.flush()
            self.output.text += tail
            if self._stream.stopped:
                self.output.finish = "stop"
            if tail:
                yield tail

    def _step(self, sequence: Cached) -> tuple[TokenTree, Walked]:
        """One pass: draft, forward, walk, commit, learn."""
        context = self._tokens[: len(self._history)]
        start = perf_counter()
        # A tree need not reach past the last token wanted: its root yields one already.
        room = self._limit - len(self.output.tokens) - 1
        nodes = self._budget.ask() if room else 0
        tree = TokenTree.root(int(context[-1]))
        if nodes:
            proposed = self._drafter.propose(context, nodes)
            tree = proposed.cut(room)
            for control in self._filters:
                tree = tree.keep(control.allows(self._history, tree))
            tree = self._budget.choose(tree, perf_counter() - start)
        drafted = perf_counter()
        logits = self._engine.forward([(sequence, tree)])
        passed = perf_counter()
        if self._rejects:
            rows = self._drafter.distributions() if nodes else None
            q = np.zeros_like(logits) if rows is None else rows[proposed.depths() <= room]
            walked = rejection_walk(tree, logits, q, self._history, self._request)
        elif self._drafter.rollback is not None:
            leniency = self._drafter.rollback
            walked = lenient_walk(tree, logits, self._history, self._request, leniency)
        else:
            walked = walk(tree, logits, self._history, self._request, self._margins)
        self._engine.commit(sequence, walked.path)
        learning = perf_counter()
        if nodes:
            path, drawn = np.array(walked.path, np.int32), np.array(walked.drawn, np.int32)
            self._learn(context, tree, logits, path, drawn)
        draft = drafted - start + perf_counter() - learning if nodes else 0.0
        self._budget.record(tree, walked.path, draft, passed - drafted)
        self.output.passes += 1
        self.output.nodes += len(tree)
        self.output.seconds.draft += draft
        self.output.seconds.forward += passed - drafted
        self.output.seconds.walk += learning - passed
        return tree, walked

    def _learn(
        self, context: Tokens, tree: TokenTree, logits: Floats, path: Tokens, drawn: Tokens
    ) -> None:
        if self._drafter.top_k:
            k = min(self._drafter.top_k, logits.shape[1])
            tokens, probs = _native.top(logits, k)
            self._drafter.observe(Step(context, tree, tokens, probs, path, drawn))

    def _accept(self, tree: TokenTree, walked: Walked) -> tuple[str, bool]:
        """Append the drawn tokens up to the first that ends the output."""
        output, text, done = self.output, "", False
        for place, token in enumerate(walked.drawn):
            output.tokens.append(token)
            self._tokens[len(self._request.prompt) + len(output.tokens) - 1] = token
            if self._margins:
                output.margins.append(walked.margins[place])
            if place:
                name = self._drafter.origins[tree.origin[walked.path[place]]]
                output.accepted[name] = output.accepted.get(name, 0) + 1
            if token in self._request.stop_tokens:
                done = True
                text += self._stream.flush() if self._stream else ""
            elif self._stream:
                text += self._stream.push(token)
                done = self._stream.stopped
            if done:
                output.finish = "stop"
                break
        output.text += text
        return text, done


def check_request(engine: Engine, request: Request) -> None:
    """Refuse a request that an engine cannot serve.

    Raises:
        RequestError: as `Generation`.
    """
    prompt, context = len(request.prompt), engine.config.context
    vocabulary = engine.config.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if prompt >= context:
        raise RequestError(
            f"the prompt has {prompt} tokens, but the model sees {context}; shorten it"
        )
    wrong = next((t for t in request.prompt if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise RequestError(f"token {wrong} is outside the vocabulary of {vocabulary}")
    if request.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {request.max_new_tokens}, expected at least 1")
    if not 0 <= request.temperature < np.inf:
        raise RequestError(f"temperature is {request.temperature}, expected 0 or more")


def _rejects(request: Request, drafter: Drafter, budget: Budget) -> bool:
    """Whether the rejection walk is wanted, and can be done."""
    if request.walk == "gumbel" or (request.walk == "rejection" and request.temperature == 0):
        return False  # greedy decoding has one walk
    if request.walk != "rejection":
        raise MethodError(f"the walk is {request.walk!r}, expected gumbel or rejection")
    if drafter.rollback is not None or not drafter.knows_chances:
        names = ", ".join(drafter.origins)
        raise MethodError(
            f"the rejection walk needs a drafter that knows what its guesses were drawn from, and "
            f"{names} does not; use a draft model with the target's tokens, or walk=gumbel"
        )
    if not isinstance(budget, Fixed):
        raise MethodError(
            "the rejection walk needs a fixed budget: auto leaves out guesses by what was drawn, "
            "which changes the law; give a number of nodes"
        )
    return True
