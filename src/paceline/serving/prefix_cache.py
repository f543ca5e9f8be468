"""What earlier requests have computed, kept for those that begin with the same tokens.

A radix tree over tokens (SGLang, Zheng et al. 2024, section 3). Every node holds a sequence of the
engine that ends where the node does; where forks share pages, a node costs those behind its
parent's only.
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
    """What a cache has been good for.

    Attributes:
        lookups: calls of `match`.
        hits: those that found a token or more.
        asked: tokens that were looked up.
        saved: those that were found, and need not be computed.
        evicted: ends of texts that were given up.
    """

    lookups: int = 0
    hits: int = 0
    asked: int = 0
    saved: int = 0
    evicted: int = 0


@dataclass(eq=False, slots=True)
class _PrefixNode:
    tokens: Tokens  # behind the parent's
    sequence: Cached  # of all tokens from the root on
    parent: _PrefixNode | None = None  # None: the root, or given up
    children: dict[int, _PrefixNode] = field(default_factory=dict)  # by their first token
    used: int = 0  # when, by the clock of the cache
    pinned: bool = False


class PrefixCache:
    """Finds the longest beginning of a text that the engine has computed before.

    Keys and values depend on the tokens up to their position, so what is found is what the engine
    would compute: bit by bit where it is `invariant`. For one thread at a time.

    Args:
        engine: whose sequences are kept.
        limit: most pages that the cache may hold, each counted once. They are among those that
            `Engine.memory` counts as used.

    Raises:
        MethodError: the engine does not count its pages.
        RequestError: the limit is negative.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        if limit < 0:
            raise RequestError(f"a prefix cache of {limit} pages, expected 0 or more")
        self.engine = engine
        self.limit = limit
        self.statistics = PrefixStatistics()
        self._root = _PrefixNode(np.empty(0, np.int32), engine.open())
        self._held = Counter(engine.pages(self._root.sequence))  # page -> nodes that hold it
        self._clock = 0

    @property
    def pages(self) -> int:
        """Pages that are held, each counted once."""
        return len(self._held)

    def holds(self, page: int) -> bool:
        """Whether a page is among those of the cache."""
        return page in self._held

    def idle(self, held: set[int]) -> int:
        """Pages that only the cache holds; `held` are those of other sequences."""
        return len(self._held.keys() - held)

    def __len__(self) -> int:
        """Nodes of the tree."""
        return sum(1 for _ in self._nodes())

    def match(self, tokens: Tokens) -> tuple[Cached, int]:
        """A new sequence of the longest known beginning of `tokens` [S], and its length.

        The sequence is the caller's, to extend and to release. Leave out the last token of a
        prompt: it is run to get logits.

        Raises:
            MemoryFullError: the engine copies what it forks, and has no room.
        """
        node, _, length = self._walk(tokens)
        sequence = self._copy(node.sequence, length)
        self._touch(node)
        self.statistics.lookups += 1
        self.statistics.hits += length > 0
        self.statistics.asked += len(tokens)
        self.statistics.saved += length
        return sequence, length

    def insert(self, tokens: Tokens, sequence: Cached, pin: bool = False) -> bool:
        """Keep `tokens` [S], which the first positions of `sequence` hold; it stays the caller's.

        Args:
            tokens: a text.
            sequence: one that begins with it.
            pin: keep the text, whoever else needs room, until `unpin`.

        Returns:
            whether the text is known now. It is not where it takes more pages than the limit
            leaves beside pinned texts, or the engine has no room for a copy; where pins are the
            reason, other texts may have been given up in vain.

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
                if _spare(parent):  # the longer text says it all
                    self._give_up(parent)
        except MemoryFullError:
            return False
        self._touch(node)
        self._shrink_to(self.limit)
        if node is not self._root and node.parent is None:
            return False
        node.pinned |= pin and node is not self._root
        return True

    def unpin(self, tokens: Tokens) -> None:
        """Let a text go when there is need.

        Raises:
            RequestError: it is not pinned.
        """
        node, inside, length = self._walk(tokens)
        if length < len(tokens) or inside < len(node.tokens) or not node.pinned:
            raise RequestError(f"this text of {len(tokens)} tokens is not pinned")
        node.pinned = False

    def shrink(self, pages: int) -> int:
        """Give up texts, those used longest ago first, until so many pages fewer are held.

        Returns:
            how many pages fewer. Those that running sequences hold, too, are not free yet.
        """
        before = self.pages
        self._shrink_to(before - pages)
        return before - self.pages

    def clear(self) -> None:
        """Give up everything, pinned texts too."""
        for node in list(self._nodes()):
            node.pinned = False
        self._shrink_to(0)

    def _nodes(self) -> Iterator[_PrefixNode]:
        """All but the root."""
        left = list(self._root.children.values())
        while left:
            node = left.pop()
            left += node.children.values()
            yield node

    def _walk(self, tokens: Tokens) -> tuple[_PrefixNode, int, int]:
        """The last node on the way of `tokens`, how many of its own fit, and how many of all."""
        node, inside, length = self._root, 0, 0
        while length < len(tokens) and inside == len(node.tokens):
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            node, inside = child, _common(child.tokens, tokens[length:])
            length += inside
        return node, inside, length

    def _copy(self, sequence: Cached, length: int) -> Cached:
        copy = self.engine.fork(sequence)
        self.engine.truncate(copy, length)
        return copy

    def _split(self, node: _PrefixNode, inside: int, length: int) -> _PrefixNode:
        """A new node in front of one that keeps what follows its first `inside` tokens."""
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
        way: _PrefixNode | None = node
        while way:
            way.used, way = self._clock, way.parent

    def _shrink_to(self, pages: int) -> None:
        """Give up nodes until no more than `pages` are held, or only pinned texts are left."""
        while self.pages > max(pages, 0):
            oldest = min(filter(_spare, self._nodes()), key=lambda node: node.used, default=None)
            if oldest is None:
                return
            self._give_up(oldest)
            self.statistics.evicted += not oldest.children

    def _give_up(self, node: _PrefixNode) -> None:
        """Let a leaf go, or join a node with its only child, which knows its text, too."""
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


def _spare(node: _PrefixNode) -> bool:
    """Whether a node can be given up without others."""
    return len(node.children) < 2 and not node.pinned and node.parent is not None


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    parted = np.flatnonzero(a[:size] != b[:size])
    return int(parted[0]) if len(parted) else size
