"""Between two tokenizers, by way of the text, for a draft with other tokens than the target."""

from __future__ import annotations

import numpy as np

from paceline.core import Tokens, TokenTree
from paceline.drafters.base import grown
from paceline.models.tokenizer import Tokenizer

_TAIL = 8  # tokens before a guess that are tokenised with it
_BROKEN = "\ufffd"  # what decoding makes of half a character
_APART = "\n"  # hardly any token begins before and ends after it


class Translation:
    """Turns the target's text into the draft's tokens, and the draft's guesses into the target's.

    Args:
        draft, target: their tokenizers.
        vocab_size: tokens of the target model.
    """

    def __init__(self, draft: Tokenizer, target: Tokenizer, vocab_size: int) -> None:
        self._draft, self._target, self._vocab_size = draft, target, vocab_size

    def into(self, context: Tokens) -> Tokens:
        """The text of the target's tokens in those of the draft; empty where it has none.

        Tokenises all of the text: linear in its length, some microseconds for a hundred tokens.
        """
        text = self._target.decode(context.tolist())
        broken = not text or text.endswith(_BROKEN)
        return np.array([] if broken else self._draft.encode(text), np.int32)

    def back(self, context: Tokens, own: Tokens, tree: TokenTree, budget: int) -> TokenTree:
        """A tree of the target's tokens after `context`.

        Args:
            context: in the target's tokens.
            own: the same text in the draft's.
            tree: guesses after `own`.
            budget: most nodes of the result beyond its root.
        """
        depths = tree.depths()
        chances = _path_chances(tree)
        inner = set(tree.parents.tolist())
        reached: dict[tuple[int, ...], float] = {(): 1.0}
        for leaf in range(1, len(tree)):
            if leaf in inner:
                continue
            path = _path(tree, leaf, int(depths[leaf]))
            ends, text = self._text(own, tree.tokens[path])
            before, chance = tuple[int, ...](), 1.0
            for token, end in self._retokenised(context, text):
                if token >= self._vocab_size:
                    break
                before = (*before, token)
                node = path[min(int(np.searchsorted(ends, end)), len(path) - 1)]
                chance = min(chance, chances[node])
                reached[before] = max(reached.get(before, 0.0), chance)
        return _tree(int(context[-1]), reached, budget)

    def _text(self, own: Tokens, path: Tokens) -> tuple[list[int], str]:
        """The text of a guessed path, and where each of its tokens ends in it."""
        tail = own[-_TAIL:].tolist()
        base = self._draft.decode(tail)
        ids, ends, text = path.tolist(), list[int](), ""
        for count in range(1, len(ids) + 1):
            text = self._draft.decode(tail + ids[:count])[len(base) :]
            ends.append(len(text))
        return ends, text.rstrip(_BROKEN)

    def _retokenised(self, context: Tokens, text: str) -> list[tuple[int, int]]:
        """The target's tokens of `text` after `context`, and where each ends in it.

        None where the tokenizer would rather join the text with what stands before it.
        """
        for before in (self._target.decode(context[-_TAIL:].tolist()), _APART):
            base = self._target.encode(before, special=False)
            ids = self._target.encode(before + text, special=False)
            if ids[: len(base)] == base:
                new = ids[len(base) :]
                start = len(self._target.decode(base))
                wholes = (self._target.decode(base + new[: n + 1]) for n in range(len(new)))
                return [(t, len(w) - start) for t, w in zip(new, wholes, strict=True)]
        return []


def _path_chances(tree: TokenTree) -> list[float]:
    chances: list[float] = tree.scores.tolist()
    for node in range(1, len(tree)):
        chances[node] *= chances[tree.parents[node]]
    return chances


def _path(tree: TokenTree, leaf: int, depth: int) -> list[int]:
    """The nodes from below the root to `leaf`."""
    path = [leaf]
    for _ in range(depth - 1):
        path.append(int(tree.parents[path[-1]]))
    return path[::-1]


def _tree(root: int, reached: dict[tuple[int, ...], float], budget: int) -> TokenTree:
    """The likeliest of some token strings, each with all its beginnings, below a root."""
    best = sorted(reached, key=lambda string: (-reached[string], len(string)))[: budget + 1]
    place = {string: node for node, string in enumerate(best)}
    above = [place[string[:-1]] if string else -1 for string in best]
    scores = [reached[s] / max(reached[s[:-1]], 1e-12) if s else 1.0 for s in best]
    return grown(
        np.array([string[-1] if string else root for string in best], np.int32),
        np.array(above, np.int32),
        np.clip(np.array(scores, np.float32), 0.0, 1.0),
    )
