"""Translation between two tokenizers by way of text, for a draft with another vocabulary."""

from __future__ import annotations

from functools import cached_property
from string import ascii_letters

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.drafters.base import single_origin_tree
from paceline.models.tokenizer import Tokenizer

_TAIL = 8  # tokens before a draft that are tokenised with it
_BROKEN = "\ufffd"  # what decoding makes of half a character
_HEALED = 4  # last tokens of a text that may be tokenised again
_NONE = np.empty(0, np.int32)
_APART = "\n"  # hardly any token spans it


class CrossTokenizer:
    """Translates the target's text into draft tokens, and drafts into the target's tokens.

    Args:
        draft, target: their tokenizers.
        vocab_size: tokens of the target model.
    """

    def __init__(self, draft: Tokenizer, target: Tokenizer, vocab_size: int) -> None:
        self._draft, self._target, self._vocab_size = draft, target, vocab_size

    def into(self, context: Tokens) -> tuple[Tokens, str]:
        """Return the text of `context` in the draft's tokens, and its end that they leave out.

        A text that stops inside or right before a word is cut before that word, whose tokens may
        still change; drafts must begin with the rest ("token healing"). No tokens if the draft
        cannot read the text. Tokenises all of it: linear in its length.
        """
        text = self._target.decode(context.tolist())
        if not text or text.endswith(_BROKEN):
            return _NONE, ""
        ids = self._draft.encode(text)
        whole = len(ids) - (text[-1].isalnum() or text[-1] == " ")
        partial = _NONE, ""
        for count in range(whole, max(whole - _HEALED, 0), -1):
            said = self._said(ids[:count])
            if not text.startswith(said):
                continue
            rest = text[len(said) :]
            if not rest[:1].strip() or not said[-1:].strip():  # a word begins here
                return np.array(ids[:count], np.int32), rest
            if not len(partial[0]):
                partial = np.array(ids[:count], np.int32), rest
        return partial

    def begun(self, logits: Floats, tree: TokenTree, rest: str) -> Floats:
        """Return `logits` [n, V] of the last nodes of `tree`, minus tokens that `rest` excludes."""
        logits = logits.copy()
        for row, node in zip(logits, range(len(tree) - len(logits), len(tree)), strict=True):
            path = _path(tree, node)
            left = rest[len("".join(self._pieces[t] for t in tree.tokens[path].tolist())) :]
            fits = [
                token
                for token in self._by_letter.get(left[:1], ())
                if self._pieces[token].startswith(left) or left.startswith(self._pieces[token])
            ]
            if left and fits:
                kept = row[fits]
                row[:] = -np.inf
                row[fits] = kept
        return logits

    def back(
        self, context: Tokens, own: Tokens, rest: str, tree: TokenTree, budget: int
    ) -> TokenTree:
        """Translate a tree of draft tokens into one of the target's tokens after `context`.

        Args:
            context: in the target's tokens.
            own: the same text in the draft's tokens, as far as `into` keeps it.
            rest: the end of the text that `own` leaves out.
            tree: the draft after `own`.
            budget: most nodes of the result beyond its root.
        """
        probs = _path_probs(tree)
        inner = set(tree.parents.tolist())
        reached: dict[tuple[int, ...], float] = {(): 1.0}
        for leaf in range(1, len(tree)):
            if leaf in inner:
                continue
            path = _path(tree, leaf)
            ends, text = self._text(own, rest, tree.tokens[path])
            before, probability = tuple[int, ...](), 1.0
            for token, end in self._retokenised(context, text):
                if token >= self._vocab_size:
                    break
                before = (*before, token)
                node = path[min(int(np.searchsorted(ends, end)), len(path) - 1)]
                probability = min(probability, probs[node])
                reached[before] = max(reached.get(before, 0.0), probability)
        return _tree(int(context[-1]), reached, budget)

    def _text(self, own: Tokens, rest: str, path: Tokens) -> tuple[list[int], str]:
        """Return the text of a draft path after `rest`, and where each of its tokens ends in it."""
        tail = own[-_TAIL:].tolist()
        start = len(self._said(tail))
        ids, ends, text = path.tolist(), list[int](), ""
        for count in range(1, len(ids) + 1):
            text = self._said(tail + ids[:count])[start:]
            ends.append(len(text) - len(rest))
        # A space at the end belongs to what comes next.
        fits = text.startswith(rest)
        return ends, text[len(rest) :].rstrip(_BROKEN).rstrip(" ") if fits else ""

    def _said(self, ids: list[int]) -> str:
        """Return the text of some draft tokens, trailing spaces included."""
        if self._letter is None:
            return self._draft.decode(ids)
        return self._draft.decode([*ids, self._letter])[:-1]

    @cached_property
    def _letter(self) -> int | None:
        """A token that is one letter in any context."""
        letters = (i for i in range(len(self._draft)) if self._draft.token(i) in ascii_letters)
        return next((i for i in letters if len(self._draft.decode([i, i])) == 2), None)

    @cached_property
    def _pieces(self) -> list[str]:
        """The text of each draft token inside a text."""
        before = [] if self._letter is None else [self._letter]
        return [self._said([*before, i])[len(before) :] for i in range(len(self._draft))]

    @cached_property
    def _by_letter(self) -> dict[str, list[int]]:
        """The draft tokens by the first letter of their text."""
        groups: dict[str, list[int]] = {}
        for token, piece in enumerate(self._pieces):
            groups.setdefault(piece[:1], []).append(token)
        return groups

    def _retokenised(self, context: Tokens, text: str) -> list[tuple[int, int]]:
        """Return the target's tokens of `text` after `context`, and where each ends in it.

        None if the tokenizer would join the text with what is before it.
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


def _path_probs(tree: TokenTree) -> list[float]:
    probs: list[float] = tree.scores.tolist()
    for node in range(1, len(tree)):
        probs[node] *= probs[tree.parents[node]]
    return probs


def _path(tree: TokenTree, node: int) -> list[int]:
    """Return the nodes from below the root to `node`."""
    path = []
    while node > 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


def _tree(root: int, reached: dict[tuple[int, ...], float], budget: int) -> TokenTree:
    """Return the tree of the most likely token sequences, each with all its prefixes."""
    best = sorted(reached, key=lambda string: (-reached[string], len(string)))[: budget + 1]
    place = {string: node for node, string in enumerate(best)}
    above = [place[string[:-1]] if string else -1 for string in best]
    scores = [reached[s] / max(reached[s[:-1]], 1e-12) if s else 1.0 for s in best]
    return single_origin_tree(
        np.array([string[-1] if string else root for string in best], np.int32),
        np.array(above, np.int32),
        np.clip(np.array(scores, np.float32), 0.0, 1.0),
    )
