"""A compiled grammar at work: which tokens may follow a text, and which must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.control.base import paths, shared
from paceline.control.capabilities import Mask
from paceline.core import Floats, Request, TokenTree
from paceline.errors import RequestError
from paceline.models.vocabulary import Vocabulary

_Path = tuple[int, ...]
_KEPT = 64  # rows of the buffer that masks are written to; a full one is replaced


class Matcher:
    """Follows a history by rolling back to the common prefix, so that calls may come in any order.

    The history that a draft was last made for is the base. Masks of tokens after it are cached:
    they are computed while drafting, when the matcher's tables are in the processor's caches, which
    the model's pass empties.

    Args:
        start: a compiled grammar's matcher at its beginning; it is copied.
        request: where the output begins, and what ends it.
        vocabulary: the tokens.
        recompile: compiles the grammar again. Copies of a matcher share the states of its lexer,
            whose number is limited, and other requests and drafts may have used them up.
    """

    def __init__(
        self, start: Any, request: Request, vocabulary: Vocabulary, recompile: Callable[[], Any]
    ) -> None:
        self._beginning, self._matcher, self._recompile = start, start.deep_copy(), recompile
        self._vocabulary = vocabulary  # keeps it alive: the matcher holds it weakly
        self._start = len(request.prompt)
        self._stops = request.stop_tokens
        self._base: list[int] = []  # tokens that the matcher has consumed: the base,
        self._path: list[int] = []  # then these
        self._masks: dict[_Path, Mask] = {}  # by the tokens after the base
        words = (vocabulary.size + 31) // 32
        self._rows = np.zeros((_KEPT, words), np.uint32)
        self._place, self._used = self._rows.ctypes.data, 0
        self._nothing = np.zeros(words, np.uint32)
        # Decoding drops a leading space, which the grammar would count as text.
        self._lost = np.zeros(words, np.uint32)
        silent = vocabulary.tokenizer.silent
        goes_on = request.continues and not silent.issuperset(request.prompt)
        dropped = vocabulary.strips and not goes_on
        for token in vocabulary.beginning(b" ").tolist() if dropped else ():
            self._lost[token // 32] |= np.uint32(1 << token % 32)

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Forbid the tokens that the grammar does not allow."""
        output = history[self._start :]
        below = len(self._base)
        known = self._masks.get(tuple(output[below:])) if output[:below] == self._base else None
        if known is None:
            if not self._follow(output):
                return logits
            known = self._computed()
        return _native.mask_logits(logits, known)

    def masks(self, history: list[int]) -> Callable[[Sequence[int]], Mask | None]:
        """Return the masks of what may follow `history` and more tokens; see `MasksTokens`."""
        return self._mask if self._set_base(history) else lambda _: None

    def known(self, history: list[int], tree: TokenTree) -> dict[int, Mask]:
        """Return the masks that were computed for nodes of `tree`; see `MasksTokens`."""
        if not self._masks or history[self._start :] != self._base:
            return {}
        masks = {node: self._masks.get(path) for node, path in enumerate(paths(tree))}
        return {node: bits for node, bits in masks.items() if bits is not None}

    def forced(self, history: list[int]) -> list[int]:
        """Return the tokens that must follow; empty where there is a choice."""
        if not self._set_base(history):
            return []
        return self._chain(())

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """Return which nodes of a tree the grammar allows, bool [N]."""
        return self.extensions(history, tree)[0]

    def extensions(
        self, history: list[int], tree: TokenTree
    ) -> tuple[NDArray[np.bool_], dict[int, list[int]]]:
        """Return the same, and the tokens that must follow allowed nodes; see `ExtendsDrafts`."""
        if not self._set_base(history):
            return np.ones(len(tree), bool), {}
        node_paths, parents = paths(tree), tree.parents.tolist()
        kept = np.zeros(len(tree), bool)
        kept[0] = True
        followed = set[_Path]()
        for node, path in enumerate(node_paths[1:], 1):
            if kept[parents[node]]:
                bits = self._mask(path[:-1])
                kept[node] = bits is not None and bool(bits[path[-1] // 32] >> path[-1] % 32 & 1)
                followed.add(path)
        chains = {}
        for node in np.flatnonzero(kept)[1:].tolist():
            chain = self._chain(node_paths[node])
            if chain and (*node_paths[node], chain[0]) not in followed:
                chains[node] = chain
        return kept, chains

    def _mask(self, path: Sequence[int]) -> Mask | None:
        """Return the mask after the base and `path`; None if the matcher fails on it."""
        key = tuple(path)
        known = self._masks.get(key)
        if known is not None:
            return known
        if not self._go(key):
            return self._nothing
        try:
            made = self._computed()
        except RequestError:
            if not key:
                raise
            self._renew()  # only a drafted path failed, which may never be drawn
            return None
        self._masks[key] = made
        self._used += 1
        return made

    def _chain(self, path: _Path) -> list[int]:
        """Return the tokens that must follow the base and `path`."""
        known = self._masks.get(path)
        if known is not None and np.count_nonzero(known) > 1:
            return []
        forced: list[int] = self._matcher.compute_ff_tokens() if self._go(path) else []
        return forced

    def _computed(self) -> Mask:
        """Compute the mask at the matcher's position, in the next free row.

        Raises:
            RequestError: the matcher fails, also when compiled again.
        """
        if self._used == _KEPT:
            self._rows, self._used = np.zeros_like(self._rows), 0
            self._place = self._rows.ctypes.data
        bits: Mask = self._rows[self._used]
        place = self._place + self._used * bits.nbytes
        self._matcher.unsafe_compute_mask_ptr(place, bits.nbytes)
        if self._matcher.is_error():
            self._restart()
            self._matcher.unsafe_compute_mask_ptr(place, bits.nbytes)
        if self._matcher.is_error():
            raise RequestError(refusal(self._matcher))
        if not self._base and not self._path:
            bits &= ~self._lost
        return bits

    def _forget(self) -> None:
        """Drop the cached masks, as the base changes."""
        self._masks.clear()
        self._used = 0

    def _go(self, path: _Path) -> bool:
        """Move the matcher after the base and `path`; return False if nothing can follow."""
        same = shared(self._path, list(path))
        if same < len(self._path):
            self._matcher.rollback(len(self._path) - same)
            del self._path[same:]
        new = path[same:]
        if not self._stops.isdisjoint(new):
            return False
        count = self._matcher.try_consume_tokens(list(new)) if new else 0
        self._path += new[:count]
        if self._matcher.is_error():
            self._renew()
            return False
        return count == len(new)

    def _renew(self) -> None:
        """Put a matcher without errors at the base."""
        self._matcher, self._path = self._beginning.deep_copy(), []
        if self._matcher.try_consume_tokens(self._base) < len(self._base):
            self._restart()

    def _restart(self) -> None:
        """Compile the grammar again, and go to where the matcher was."""
        self._beginning = self._recompile()
        self._matcher = self._beginning.deep_copy()
        self._matcher.try_consume_tokens([*self._base, *self._path])

    def _set_base(self, history: list[int]) -> bool:
        """Make the history the base; return False if it passes a stop token."""
        output = history[self._start :]
        if output == self._base and not self._path:
            return True
        if not self._follow(output):
            return False
        if len(self._base) < len(output):
            self._forget()
        self._base, self._path = output, []
        return True

    def _follow(self, output: list[int]) -> bool:
        """Move the matcher to the end of an output; return False if it passes a stop token.

        Raises:
            RequestError: the output is not in the grammar.
        """
        if output[: len(self._base)] != self._base:
            same = shared(self._base, output)
            self._matcher.rollback(len(self._path) + len(self._base) - same)
            del self._base[same:]
            self._path = []
            self._forget()
        rest = output[len(self._base) :]
        ended = not self._stops.isdisjoint(rest)
        if ended:
            rest = list(takewhile(lambda token: token not in self._stops, rest))
        same = shared(self._path, rest)
        self._matcher.rollback(len(self._path) - same)
        del self._path[same:]
        new = rest[same:]
        count = self._matcher.try_consume_tokens(new) if new else 0
        if count < len(new) and self._matcher.is_error():
            self._restart()
            count = self._matcher.try_consume_tokens(new)
        self._path += new[:count]
        if count < len(new):
            if self._matcher.is_error():
                raise RequestError(refusal(self._matcher))
            place = self._start + len(self._base) + len(self._path)
            raise RequestError(
                f"token {new[count]} at position {place} is not in the "
                "grammar; a control that forces tokens contradicts it"
            )
        return not ended


def refusal(matcher: Any) -> str:
    """Return one sentence for a matcher's error, which may have many lines, with its place."""
    message = matcher.get_error().partition("<state>")[0]
    if message.startswith("NoExtension"):
        return "the grammar allows no text from here on"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    details = [line for line in lines[1:] if line.startswith("error:")]
    return f"the grammar cannot be used: {' '.join([*lines[:1], *details[-1:]])[:300]}"
