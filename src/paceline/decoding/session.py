"""A running request: what it runs next, and what follows from the logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.abilities import Ability
from paceline.compatibility import Side, check
from paceline.control.capabilities import FiltersDrafts, MasksTokens, RunsModel
from paceline.core import Floats, Output, Request, Step, Tokens, TokenTree
from paceline.decoding.filter_tree import filter_tree
from paceline.decoding.lenient import lenient_walk
from paceline.decoding.rejection import rejection_walk
from paceline.decoding.screened_walk import can_screen
from paceline.decoding.text_stream import TextStream
from paceline.decoding.walk import WalkResult, walk
from paceline.documents.assembly import Assembly
from paceline.drafters.base import Drafter, ModelBacked
from paceline.engines.base import Cached, Engine
from paceline.engines.pages import Memory
from paceline.engines.screened import Logits, ScreenedLogits, coarse
from paceline.engines.sides import engine_sides
from paceline.errors import RequestError, TooLongError
from paceline.kvcache.base import Policy

# Prompt logits for drafters that learn from it come in chunks of at most this many floats.
_PREFILL_LOGITS = 1 << 23
_STREAMED_PART = 64  # or of so many tokens, where each pass reads weights from disk


class Session:
    """A request with its text so far and its sequence. Its caller runs the forward passes.

    Call `open`. While tokens are `missing`, run the `next_part` on the `active` sequence and
    `commit_part` it; call `load_documents` after `open` and after each part. Then, until `done`:
    `propose` a tree, `run_guides` over it, run the engine over it, `verify` its logits, `learn`
    from them, and `accept` the text.
    `close` releases the sequence; another `open` may follow, and runs the text again.

    Args:
        engine: runs the model.
        drafter: proposes trees; it keeps what it learns.
        request: what to generate.
        stream: turns tokens into text and finds stop strings; None when only tokens matter.
        margins: record `Output.margins`.
        rejects: use the rejection walk.

    Attributes:
        output: complete when `done`, except its seconds.
        sequence: None while closed.
        guides: controls that run models of their own.
        hidden: hidden states [N, D] of the last tree, set by whoever runs the passes if the
            drafter `needs_hidden`.
        freed_pages: pages of the cache that the KV policy gave back so far.

    Raises:
        RequestError: empty prompt, prompt too long, token outside the vocabulary, bad number.
        MethodError: the request's KV policy does not go with the engine, drafter or a guide.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        request: Request,
        stream: TextStream | None = None,
        margins: bool = False,
        rejects: bool = False,
    ) -> None:
        check_request(engine, request)
        self.request, self.drafter, self.output = request, drafter, Output(parser=request.parser)
        self.sequence: Cached | None = None
        self.done = False
        self.hidden: Floats | None = None
        self.freed_pages = 0
        self._engine, self._stream, self._margins = engine, stream, margins
        self._policy = request.kv_policy
        if self._policy is not None:
            check_policy(self._policy, engine, drafter, request)
        self._assembly: Assembly | None = None
        self._aside: Cached | None = None  # runs the next part, if the own sequence does not
        if request.documents is not None:
            check_documents(engine, request)
            self._assembly = Assembly(engine, request.documents, request.prompt)
        self._rejects = rejects
        exact = rejects or margins or drafter.rollback is not None  # needs all logits
        pays = engine.screens_drafts or not drafter.drafts
        self._screens = pays and not exact and can_screen(request)
        # Rejection sampling needs every drafted sibling, including those that controls will reject.
        filters = [c for c in request.controls if isinstance(c, FiltersDrafts)]
        self._filters = [] if rejects else filters
        self._masking = next((c for c in self._filters if isinstance(c, MasksTokens)), None)
        self.guides = [c for c in request.controls if isinstance(c, RunsModel)]
        room = engine.config.context - len(request.prompt)
        self._limit = min(request.max_new_tokens, room)
        self._history = list(request.prompt)
        self._tokens = np.zeros(len(request.prompt) + self._limit, np.int32)
        self._tokens[: len(request.prompt)] = request.prompt
        self._proposed: TokenTree | None = None
        self._begun = self._attached = self._guided = self._prompt_read = False
        self.output.finish = "length" if self._limit == request.max_new_tokens else "context"

    @property
    def text(self) -> Tokens:
        """All committed tokens [S], prompt and output; a view that the next pass changes."""
        return self._tokens[: len(self._history)]

    @property
    def missing(self) -> int:
        """Number of tokens that the sequence lacks. The last token, the next root, never counts."""
        return len(self._history) - 1 - self.held

    @property
    def held(self) -> int:
        """Number of tokens that were run, those of documents that were run apart included."""
        if self.sequence is None:
            return 0
        return self.sequence.length + (self._assembly.progress if self._assembly else 0)

    @property
    def active(self) -> Cached | None:
        """The sequence that the next pass runs on; a document's while that is computed apart."""
        return self.sequence if self._aside is None else self._aside

    @property
    def row_count(self) -> int:
        """Rows of the cache that the request holds: fewer than its positions under a policy."""
        if self.sequence is None:
            return 0
        rows = self._engine.row_count(self.sequence)
        return rows + (self._assembly.rows if self._assembly else 0)

    @property
    def room(self) -> int:
        """Tokens that may follow the one that the next pass yields in any case."""
        return self._limit - len(self.output.tokens) - 1

    @property
    def levels(self) -> int:
        """Levels that a tree may have below its root.

        The walk must end where a KV policy acts: what lies behind is computed without the rows
        that it drops.
        """
        if self._policy is None or self.sequence is None:
            return self.room
        return min(self.room, self._policy.distance(self.sequence.length) - 1)

    @property
    def wants_prefill_logits(self) -> bool:
        """Whether `commit_part` needs logits, as the drafter learns from the prompt."""
        if self._assembly is not None and self._assembly.unfinished:
            return False  # logits of a document apart are not those of the text
        return self.drafter.learns_from_prompt and not self.output.tokens

    @property
    def can_screen(self) -> bool:
        """Whether the next pass may give screened logits; see `Engine.forward_screened`."""
        return self._screens

    def open(self, sequence: Cached | None = None) -> None:
        """Open the request in `sequence`, which may hold a prefix of the text, or in a new one.

        Raises:
            RequestError: the request has a KV policy, which has not seen that beginning, or
                documents, which may have been computed otherwise there.
        """
        if self._assembly is not None and sequence is not None and sequence.length:
            raise RequestError("a request with documents starts with an empty cache")
        if self._policy is not None and sequence is not None and sequence.length:
            raise RequestError(
                f"a request under the KV policy {self._policy.name} starts with an empty cache: "
                "what was computed before was not computed under the policy"
            )
        self.sequence = self._engine.open() if sequence is None else sequence
        self._engine.set_prompt(self.sequence, len(self.request.prompt) - 1)
        if self._policy is not None:
            self._policy.begin(self._engine, self.sequence)
        if not self._begun:
            self.drafter.begin(self.request)
            self._begun = True

    def next_part(self, max_tokens: int = 256) -> TokenTree:
        """Return the next missing tokens as a chain.

        They are at most `max_tokens`, or the block of a prompt that chooses what it reads together.
        """
        assert self.sequence is not None
        if self._assembly is not None and self._assembly.unfinished:
            on, tokens = self._assembly.part(self.sequence, max_tokens)
            self._aside = None if on is self.sequence else on
            return TokenTree.chain(tokens)
        if self.wants_prefill_logits:
            waits = self._engine.streamed_bytes or self._engine.remote_layers
            fewest = _STREAMED_PART if waits else 16
            fitting = _PREFILL_LOGITS // self._engine.config.vocab_size
            max_tokens = min(max_tokens, max(fewest, fitting))
        start = self.sequence.length
        if self._policy is not None:
            max_tokens = min(max_tokens, self._policy.distance(start))
        max_tokens = self._engine.prompt_chunk(self.sequence, max_tokens)
        return TokenTree.chain(self._tokens[start : start + min(max_tokens, self.missing)])

    def commit_part(self, tree: TokenTree, logits: Floats | None) -> None:
        """Commit a `next_part`; `logits` [N, V] are needed if it `wants_prefill_logits`."""
        assert self.sequence is not None
        if self._assembly is not None and self._assembly.unfinished:
            on, self._aside = self._aside or self.sequence, None
            self._assembly.commit(self.sequence, on, len(tree))
            return
        start, nodes = self.sequence.length, np.arange(len(tree), dtype=np.int32)
        if self.wants_prefill_logits and logits is not None:
            drawn = self._tokens[start + 1 : start + 1 + len(tree)]
            self._observe(self._tokens[: start + 1], tree, logits, nodes, drawn)
        self._commit(nodes)

    def load_documents(self) -> None:
        """Put documents into the sequence whose keys and values are stored.

        Raises:
            MemoryFullError: there is no room. Call it again later.
        """
        if self._assembly is not None and self.sequence is not None:
            self._assembly.load(self.sequence)
            self.output.cached_tokens = self._assembly.cached

    def read_prompt(self) -> None:
        """Let the drafter learn from the prompt's tokens, unless it has; `propose` does so, too."""
        if not self._prompt_read:
            self._prompt_read = True
            self.drafter.read_prompt()

    def propose(self, nodes: int, forced_nodes: int = 0, min_path_prob: float = 0.0) -> TokenTree:
        """Return the drafter's tree of at most `nodes` below the root; with 0 the drafter rests.

        Paths with a probability below `min_path_prob` need not be proposed. At rest, the drafter
        is still asked for at most `forced_nodes` nodes of forced tokens.
        """
        assert self.sequence is not None
        if not self._attached:
            if isinstance(self.drafter, ModelBacked):
                self.drafter.attach(self.sequence)
            self._attached = True
        self._proposed = None
        levels = self.levels
        if not nodes and forced_nodes and levels:
            return self.drafter.forced_tree(self.text, min(forced_nodes, levels))
        if not nodes or not levels:
            return TokenTree.root(self._history[-1])
        self.read_prompt()
        self._proposed = self.drafter.propose(self.text, nodes, min_path_prob)
        tree = self._proposed.cut(levels)
        if self._filters:
            tree = filter_tree(tree, self._filters, self._history, nodes).cut(levels)
        return tree

    def begin_guides(self) -> None:
        """Let guides read the text. Without this, the first `run_guides` does."""
        if not self._guided:
            self.advance_guides()

    def advance_guides(self, max_tokens: int | None = None) -> int:
        """Let every guide read up to `max_tokens` more; return the largest number read.

        Raises:
            MemoryFullError: there is no room for their sequences. Call it again later.
        """
        if not self._guided and self.sequence is not None:
            self._guided = True
            for guide in self.guides:
                guide.begin(self.sequence)
        return max((guide.follow(self.text, max_tokens) for guide in self.guides), default=0)

    @property
    def guide_lag(self) -> int:
        """Most tokens that a guide has not read; above 0, `run_guides` takes several passes."""
        return max((guide.lag(self.text) for guide in self.guides), default=0)

    def run_guides(self, tree: TokenTree) -> None:
        """Let guides run their models over the tree, before the target does.

        Raises:
            MemoryFullError: there is no room for it. Call it again later.
        """
        self.begin_guides()
        for guide in self.guides:
            guide.run_tree(self.text, tree)

    def verify(self, tree: TokenTree, logits: Logits) -> WalkResult:
        """Walk the tree over its logits [N, V], and commit the accepted nodes.

        They may be screened if the request `can_screen`.
        """
        assert self.sequence is not None
        if isinstance(logits, ScreenedLogits):
            walked = walk(tree, logits, self._history, self.request, self._margins)
        elif self._rejects:
            q = np.zeros_like(logits)
            if self._proposed is not None and isinstance(self.drafter, ModelBacked):
                rows = self.drafter.distributions()
                q = q if rows is None else rows[self._proposed.depths() <= self.levels]
            walked = rejection_walk(tree, logits, q, self._history, self.request)
        elif self.drafter.rollback is not None:
            leniency = self.drafter.rollback
            walked = lenient_walk(tree, logits, self._history, self.request, leniency)
        else:
            walked = walk(tree, logits, self._history, self.request, self._margins)
        # All of them, also those after a stop, as the sequence holds their keys and values.
        self._tokens[len(self._history) - len(walked.drawn) : len(self._history)] = walked.drawn
        self._commit(walked.path)
        self.output.passes += 1
        self.output.nodes += len(tree)
        return walked

    def learn(self, tree: TokenTree, logits: Logits, walked: WalkResult) -> None:
        """Show the pass to the drafter, if it drafted for it; coarse logits where screened."""
        if self._proposed is not None:
            logits = coarse(logits)
            context = self._tokens[: len(self._history) - len(walked.drawn)]
            path, drawn = np.array(walked.path, np.int32), np.array(walked.drawn, np.int32)
            masks = self._masks(context, tree)
            self._observe(context, tree, logits, path, drawn, masks)

    def accept(self, tree: TokenTree, walked: WalkResult) -> list[str]:
        """Append the drawn tokens up to the first that ends the output.

        Returns:
            the text that became final with each of them; when `done`, the last has all the rest.
        """
        output, texts = self.output, list[str]()
        for place, token in enumerate(walked.drawn):
            output.tokens.append(token)
            if self._margins:
                output.margins.append(walked.margins[place])
            if place:
                name = self.drafter.origins[tree.origin[walked.path[place]]]
                output.accepted[name] = output.accepted.get(name, 0) + 1
            texts.append("")
            if token in self.request.stop_tokens:
                self.done, output.finish = True, "stop"
                break
            texts[-1] = self._stream.push(token) if self._stream else ""
            if self._stream and self._stream.stopped:
                break
        self.done = self.done or len(output.tokens) >= self._limit
        if self._stream:
            texts[-1] += self._stream.flush() if self.done else ""
            if self._stream.stopped:
                self.done, output.finish = True, "stop"
                output.stopped_by = self._stream.stopped_by
        output.text += "".join(texts)
        return texts

    def close(self) -> None:
        """Release the sequence, and those of guides."""
        sequence, self.sequence, self._attached = self.sequence, None, False
        if self._assembly is not None:
            self._assembly.close()
            self._aside = None
        if sequence is not None:
            self._engine.release(sequence)
        self._guided = False
        for guide in self.guides:
            guide.release()

    def _commit(self, path: Sequence[int] | Tokens) -> None:
        """Keep the rows of accepted nodes, and let the KV policy act where it is time."""
        assert self.sequence is not None
        self._engine.commit(self.sequence, path)
        if self._policy is not None:
            held = self.row_count
            if self._policy.act(self._engine, self.sequence):
                self.freed_pages += Memory.pages(held) - Memory.pages(self.row_count)

    def _masks(self, context: Tokens, tree: TokenTree) -> NDArray[np.uint32] | None:
        """Return bit masks of allowed tokens [N, V / 32], all set where no control gave one."""
        if not self._masking:
            return None
        known = self._masking.known(context.tolist(), tree)
        words = (self._engine.config.vocab_size + 31) // 32
        masks = np.full((len(tree), words), 0xFFFFFFFF, np.uint32)
        for node, mask in known.items():
            masks[node] = mask
        return masks

    def _observe(
        self,
        context: Tokens,
        tree: TokenTree,
        logits: Floats,
        path: Tokens,
        drawn: Tokens,
        masks: NDArray[np.uint32] | None = None,
    ) -> None:
        hidden, self.hidden = self.hidden, None
        if self.drafter.top_k or hidden is not None:
            k = min(max(1, self.drafter.top_k), logits.shape[1])
            tokens, probs = _native.top_k(logits, k, masks)
            self.drafter.observe(Step(context, tree, tokens, probs, path, drawn, hidden))


def give_hidden(engine: Engine, sessions: Sequence[Session], sizes: Sequence[int]) -> None:
    """Hand the hidden states of the last pass to the sessions whose drafters need them.

    Args:
        engine: has just run the pass.
        sessions: in the order of its batch.
        sizes: rows of logits of each in that pass; without any there are no states.
    """
    if any(sizes) and any(session.drafter.needs_hidden for session in sessions):
        states = np.split(engine.hidden(), np.cumsum(sizes)[:-1])
        for session, own in zip(sessions, states, strict=True):
            session.hidden = own if session.drafter.needs_hidden and len(own) else None


def check_request(engine: Engine, request: Request) -> None:
    """Refuse a request that an engine cannot serve.

    Raises:
        RequestError: as `Session`.
    """
    prompt, context = len(request.prompt), engine.config.context
    vocabulary = engine.config.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if prompt >= context:
        raise TooLongError(
            f"the prompt has {prompt} tokens, but the model sees {context}; shorten it"
        )
    wrong = next((t for t in request.prompt if not 0 <= t < vocabulary), None)
    if wrong is not None:
        raise RequestError(f"token {wrong} is outside the vocabulary of {vocabulary}")
    if request.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {request.max_new_tokens}, expected at least 1")
    if not 0 <= request.temperature < np.inf:
        raise RequestError(f"temperature is {request.temperature}, expected 0 or more")


def check_documents(engine: Engine, request: Request) -> None:
    """Refuse documents beside an engine, a KV policy or a guide that they do not go with.

    Raises:
        MethodError: names both and the reason.
    """
    sides = {Side.DOCUMENTS: "documents", **engine_sides(engine)}
    if request.kv_policy is not None:
        sides[Side.KV_POLICY] = f"the KV policy {request.kv_policy.name}"
    if any(isinstance(each, RunsModel) for each in request.controls):
        sides[Side.GUIDE] = "a guide"
    check(sides)
    if request.documents is not None:
        request.documents.check(engine)


def check_policy(policy: Policy, engine: Engine, drafter: Drafter, request: Request) -> None:
    """Refuse a KV policy with an engine, drafter or guide that it does not go with.

    Raises:
        MethodError: names both and the reason.
    """
    policy.check(engine)
    sides = {Side.KV_POLICY: f"the KV policy {policy.name}"}
    if Ability.POSITIONS in drafter.needs:
        sides[Side.POSITION_DRAFTER] = f"the drafter {', '.join(drafter.origins)}"
    if any(isinstance(each, RunsModel) for each in request.controls):
        sides[Side.GUIDE] = "a guide"
    check(sides)
