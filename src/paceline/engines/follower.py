"""A cache that follows a growing text, for drafters and guides that run a model."""

from __future__ import annotations

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.engines.view import View

_NONE = np.empty(0, np.int32)
_LATE = 8  # tokens behind the root from which catching up takes its own pass, without a head


class Follower:
    """Runs trees after a growing text, and reuses every row that is still valid.

    Rows of the last tree that match the new text are committed, rows that the text contradicts are
    truncated, and a new request keeps the prefix that it shares with the one before.

    Args:
        engine: runs the model; nobody else may use this follower's sequence.

    Attributes:
        paced: the caller says how much to read; otherwise no more than fits in a tree's pass.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sequence: Cached | None = None
        self._held = _NONE  # committed tokens
        self._pending: TokenTree | None = None  # the last tree that was run, not committed
        self.paced = False

    def room(self, context: Tokens) -> int:
        """Return how many levels below the root can be run; negative if not even the root can."""
        if self.paced and self.behind(context):
            return -1
        return self._levels(context)

    def _levels(self, context: Tokens) -> int:
        if len(context) and int(context.max()) >= self.engine.config.vocab_size:
            return -1
        return self.engine.config.context - len(context)

    def behind(self, context: Tokens) -> int:
        """Return how many tokens of `context` [S] to read first; 0 if they fit in the next pass."""
        if not len(context) or self._levels(context) < 0:
            return 0
        late = len(self._catch_up(context))
        return late if late > _LATE else 0

    def follow(self, context: Tokens, most: int | None = None) -> int:
        """Commit all of `context` [S] but its last token; return how many were run for it.

        With `most` no more than that, and none if they fit in the pass of the next tree.
        """
        if not len(context) or self._levels(context) < 0:
            return 0
        late = self._catch_up(context)
        if most is not None:
            late = late[:most] if len(late) > _LATE else late[:0]
        self._read(late)
        return len(late)

    def run(self, context: Tokens, tree: TokenTree, view: View | None = None) -> Floats:
        """Return the logits [N, V] of a tree with root `context[-1]`; valid until the next pass."""
        if view is not None and view.partial:
            self._read(self._catch_up(context))
            assert self._sequence is not None
            return self.engine.forward([(self._sequence, tree)], view=view)
        sequence, grafted = self.ready(context, tree)
        logits = self.engine.forward([(sequence, grafted)], view=view)
        self.ran(grafted)
        return logits[-len(tree) :]

    def ready(self, context: Tokens, tree: TokenTree) -> tuple[Cached, TokenTree]:
        """Return the sequence and tree of a pass: `tree` below the few tokens that are missing.

        Followers of one engine can so share a pass. Call `ran` with that tree afterwards.
        """
        late = self._catch_up(context)
        if len(late) > _LATE:
            self._read(late)
            late = _NONE
        assert self._sequence is not None
        return self._sequence, _graft(late, tree)

    def ran(self, tree: TokenTree) -> None:
        """Record that the `tree` of `ready` was run in the last pass of this sequence."""
        self._pending = tree

    def fork(self, context: Tokens) -> Follower:
        """Fork: return a new follower that shares the prefix of `context` [S] read so far."""
        other = Follower(self.engine)
        if self._sequence is not None:
            self._catch_up(context)
            other._sequence, other._held = self.engine.fork(self._sequence), self._held
        return other

    def reset(self) -> None:
        """Release the cache."""
        if self._sequence is not None:
            self.engine.release(self._sequence)
        self._sequence, self._held, self._pending = None, _NONE, None

    def _read(self, late: Tokens) -> None:
        if len(late):
            assert self._sequence is not None
            self.engine.extend(self._sequence, late)
            self._held = np.concatenate([self._held, late])

    def _catch_up(self, context: Tokens) -> Tokens:
        """Make the cache a prefix of `context[:-1]`; return what is still missing of it."""
        wanted = context[:-1]
        if self._sequence is None:
            self._sequence = self.engine.open()
        held, pending = self._held, self._pending
        self._pending = None
        if self._sequence.length > len(held):  # an interrupted pass
            self.engine.rewind(self._sequence, held)
        common = _common(held, wanted)
        if common < len(held):
            common = self.engine.cut_point(self._sequence, common)
            self.engine.truncate(self._sequence, common)
            self._held = wanted[:common].copy()
        elif pending is not None:
            path = _path(pending, wanted[common:])
            if path:
                self.engine.commit(self._sequence, path)
                self._held = wanted[: common + len(path)].copy()
        return wanted[len(self._held) :]


def _common(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _path(tree: TokenTree, tokens: Tokens) -> list[int]:
    """Return the nodes from the root on that hold `tokens`, as far as there are any."""
    if not len(tokens) or tokens[0] != tree.tokens[0]:
        return []
    path = [0]
    for token in tokens[1:].tolist():
        child = tree.child(path[-1], token)
        if child is None:
            break
        path.append(child)
    return path


def _graft(chain: Tokens, tree: TokenTree) -> TokenTree:
    """Return `tree` below a chain of tokens."""
    n = len(chain)
    if not n:
        return tree
    top = TokenTree.chain(np.append(chain, tree.tokens[0]))
    origin = np.concatenate([top.origin, tree.origin[1:]])
    return TokenTree(
        np.concatenate([top.tokens, tree.tokens[1:]]),
        np.concatenate([top.parents, tree.parents[1:] + n]).astype(np.int32),
        np.concatenate([top.scores, tree.scores[1:]]),
        origin,
    )
