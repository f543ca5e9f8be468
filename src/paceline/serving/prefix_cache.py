"""Keeps computed prefixes for later requests that begin with the same tokens.

A radix tree over tokens (SGLang, Zheng et al. 2024, section 3). Every node holds a sequence of the
engine that ends where the node does; where forks share pages, a node costs only the pages behind
its parent's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from paceline.core import Tokens
from paceline.engines.base import Cached, Engine
from paceline.engines.pages import Memory
from paceline.errors import MemoryFullError, RequestError


@dataclass(slots=True)
class PrefixStatistics:
    """Hit counts of a cache.

    Attributes:
        lookups: calls of `match`.
        hits: calls that matched at least one token.
        asked: tokens looked up.
        saved: tokens matched, which need not be computed.
        evicted: texts whose end was evicted.
    """

    lookups: int = 0
    hits: int = 0
    asked: int = 0
    saved: int = 0
    evicted: int = 0


@dataclass(eq=False, slots=True)
class _PrefixNode:
    tokens: Tokens  # behind the parent's
    sequence: Cached  # of all tokens from the root on; of fewer where no cut gives these
    parent: _PrefixNode | None = None  # None: the root, or evicted
    children: dict[int, _PrefixNode] = field(default_factory=dict)  # by their first token
    used: int = 0  # time of the last use, by the counter of the cache
    pinned: bool = False


class PrefixCache:
    """Finds the longest prefix of a text that the engine has computed before.

    Keys and values depend on the tokens up to their position only, so a match is what the engine
    would compute: bit for bit where the engine is `invariant`. Not thread-safe.

    Args:
        engine: whose sequences are kept.
        limit: maximum pages of the cache, each counted once; `Engine.memory` counts them as used.

    Raises:
        MethodError: the engine does not count its pages.
        RequestError: the limit is negative.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        if limit < 0:
            raise RequestError(f"the prefix cache has a limit of {limit} pages, expected 0 or more")
        self.engine = engine
        self.limit = limit
        self.statistics = PrefixStatistics()
        self._root = _PrefixNode(np.empty(0, np.int32), engine.open())
        self._held = Counter(engine.pages(self._root.sequence))  # page -> nodes that hold it
        self._clock = 0

    @property
    def pages(self) -> int:
        """Return the number of pages held, each counted once."""
        return len(self._held)

    def holds(self, page: int) -> bool:
        """Return whether the cache holds a page."""
        return page in self._held

    def idle(self, held: set[int]) -> int:
        """Return the number of pages that only the cache holds, given those of other sequences."""
        return len(self._held.keys() - held)

    def __len__(self) -> int:
        """Return the number of nodes."""
        return sum(1 for _ in self._nodes())

    def match(self, tokens: Tokens) -> tuple[Cached, int]:
        """Return a new sequence with the longest known prefix of `tokens` [S], and its length.

        The sequence is the caller's, to extend and to release. Leave out the last token of a
        prompt: it must be run to get logits.

        Raises:
            MemoryFullError: the engine copies what it forks, and has no free page.
        """
        node, _, length = self._walk(tokens)
        sequence = self._copy(*self._longest(node, length))
        length = sequence.length
        self._touch(node)
        self.statistics.lookups += 1
        self.statistics.hits += length > 0
        self.statistics.asked += len(tokens)
        self.statistics.saved += length
        return sequence, length

    def insert(self, tokens: Tokens, sequence: Cached, pin: bool = False) -> bool:
        """Keep `tokens` [S], computed in the first positions of `sequence`.

        Args:
            tokens: a text.
            sequence: begins with the text; it stays the caller's.
            pin: do not evict the text until `unpin`.

        Returns:
            whether the text is in the cache now. It is not if it needs more pages than the limit
            leaves next to pinned texts, or the engine has no page for a copy; if pins are the
            reason, other texts may have been evicted in vain.

        Raises:
            RequestError: the sequence is shorter than the text.
        """
        if sequence.length < len(tokens):
            raise RequestError(
                f"a sequence of {sequence.length} positions cannot hold {len(tokens)} tokens"
            )
        if Memory.pages(len(tokens)) > self.limit:
            return False
        node, inside, length = self._walk(tokens)
        try:
            if inside < len(node.tokens) and (pin or length < len(tokens)):
                node = self._split(node, inside, length)
            if length < len(tokens):
                parent, node = node, self._attach(node, tokens[length:], sequence, len(tokens))
                if _removable(parent):  # the longer text contains this one
                    self._evict(parent)
        except MemoryFullError:
            return False
        self._touch(node)
        self._shrink_to(self.limit)
        if node is not self._root and node.parent is None:
            return False
        node.pinned |= pin and node is not self._root
        return True

    def unpin(self, tokens: Tokens) -> None:
        """Allow a text to be evicted again.

        Raises:
            RequestError: it is not pinned.
        """
        node, inside, length = self._walk(tokens)
        if length < len(tokens) or inside < len(node.tokens) or not node.pinned:
            raise RequestError(
                f"this text of {len(tokens)} tokens is not pinned; unpin a pinned one"
            )
        node.pinned = False

    def shrink(self, pages: int) -> int:
        """Evict texts, the least recently used first, until this many pages fewer are held.

        Returns:
            by how many pages the cache shrank. Pages that running sequences share are not free yet.
        """
        before = self.pages
        self._shrink_to(before - pages)
        return before - self.pages

    def clear(self) -> None:
        """Evict everything, pinned texts included."""
        for node in list(self._nodes()):
            node.pinned = False
        self._shrink_to(0)

    def _nodes(self) -> Iterator[_PrefixNode]:
        """Yield all nodes but the root."""
        left = list(self._root.children.values())
        while left:
            node = left.pop()
            left += node.children.values()
            yield node

    def _walk(self, tokens: Tokens) -> tuple[_PrefixNode, int, int]:
        """Return the last node along `tokens`, and how many of its and of all tokens match."""
        node, inside, length = self._root, 0, 0
        while length < len(tokens) and inside == len(node.tokens):
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            node, inside = child, _common(child.tokens, tokens[length:])
            length += inside
        return node, inside, length

    def _longest(self, node: _PrefixNode, length: int) -> tuple[Cached, int]:
        """Return which sequence of a node or its ancestors gives most of `length` tokens."""
        best, most = node.sequence, -1
        above: _PrefixNode | None = node
        while above is not None and most < length:
            held = min(length, above.sequence.length)
            point = self.engine.cut_point(above.sequence, held)
            if point > most:
                best, most = above.sequence, point
            above = above.parent
        return best, most

    def _copy(self, sequence: Cached, length: int) -> Cached:
        """Return the first `length` positions of a sequence, or up to a cut point before."""
        copy = self.engine.fork(sequence)
        length = min(length, copy.length)
        self.engine.truncate(copy, self.engine.cut_point(copy, length))
        return copy

    def _split(self, node: _PrefixNode, inside: int, length: int) -> _PrefixNode:
        """Insert a node in front of one that keeps what follows its first `inside` tokens."""
        parent = node.parent
        assert parent is not None  # the root has no tokens to split
        upper = _PrefixNode(
            node.tokens[:inside], self._copy(node.sequence, length), parent, used=node.used
        )
        parent.children[int(node.tokens[0])] = upper
        upper.children[int(node.tokens[inside])] = node
        node.tokens, node.parent = node.tokens[inside:], upper
        self._held.update(self.engine.pages(upper.sequence))
        return upper

    def _attach(
        self, parent: _PrefixNode, tokens: Tokens, sequence: Cached, length: int
    ) -> _PrefixNode:
        own = self._copy(sequence, length)
        node = parent.children[int(tokens[0])] = _PrefixNode(tokens.copy(), own, parent)
        self._held.update(self.engine.pages(own))
        return node

    def _touch(self, node: _PrefixNode) -> None:
        self._clock += 1
        ancestor: _PrefixNode | None = node
        while ancestor:
            ancestor.used, ancestor = self._clock, ancestor.parent

    def _shrink_to(self, pages: int) -> None:
        """Evict nodes until at most `pages` pages are held, or only pinned texts are left."""
        while self.pages > max(pages, 0):
            oldest = min(
                filter(_removable, self._nodes()), key=lambda node: node.used, default=None
            )
            if oldest is None:
                return
            self._evict(oldest)
            self.statistics.evicted += not oldest.children

    def _evict(self, node: _PrefixNode) -> None:
        """Remove a leaf, or merge a node into its only child, which has its text too."""
        parent, first = node.parent, int(node.tokens[0])
        assert parent is not None
        del parent.children[first]
        for child in node.children.values():
            child.tokens = np.concatenate([node.tokens, child.tokens])
            child.parent, parent.children[first] = parent, child
        node.parent = None
        for page in self.engine.pages(node.sequence):
            self._held[page] -= 1
            if not self._held[page]:
                del self._held[page]
        self.engine.release(node.sequence)


def _removable(node: _PrefixNode) -> bool:
    """Return whether a node can be removed without others."""
    return len(node.children) < 2 and not node.pinned and node.parent is not None


def _common(a: Tokens, b: Tokens) -> int:
    """Return the length of the common prefix of two texts."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
