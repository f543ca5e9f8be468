"""Superposed decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.abilities import Ability
from paceline.compatibility import Side
from paceline.core import Exactness, Floats, Request, Tokens, TokenTree
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.hypotheses.search import Hypothesis, Search
from paceline.registry import Source, check_range, strategies

_LONGEST = 5  # tokens of context of the longest n-gram
_WIDEST = 64  # drafts


@strategies.register("superposed", Exactness.LOSSY)
@dataclass(frozen=True)
class Superposed(Strategy):
    """Decode `width` continuations for little more than the passes of one.

    Each pass runs one node: the mean of the embeddings of the drafts' last tokens, weighted by the
    drafts' probabilities. Its `width` most likely tokens may follow any draft, scored by the model
    and by n-grams of known texts:

        p(x | draft) = p_model(x | all drafts) ** (1 - alpha) * p_ngrams(x | draft) ** alpha

    The best `width` of the width * width drafts go on. Where drafts differ a lot, the model sees a
    blur of them, and only the n-grams know which token belongs to which draft. In the end one plain
    pass over all drafts as a tree gives the log-probability of each under the model, by which they
    are ranked and which is their score.

    Every draft pass is a pass of the model itself, so it would not pay as a drafter of the exact
    walk. Nothing is drawn and nothing drafted. Controls and guides are refused, for the drafts
    share one row of logits. With `width=1` it is greedy decoding.

    Cost: one pass over one node a token, and one over all drafts. Memory: one cache.
    Good for: several short continuations to choose from. With small models they are far less
    likely than those of `beam`.

    Attributes:
        width: drafts, 1 to 64. Default 3. A smaller vocabulary gives fewer.
        returned: outputs given, 1 to `width`. Default 1.
        alpha: weight of the n-grams of the prompt and of what `paceline warm` kept, 0 to 1.
            Default 0: n-grams of little text make it worse; the paper's are of a large corpus.
    """

    width: int = 3
    returned: int = 1
    alpha: float = 0.0

    source = Source(authors="Shen et al.", title="Superposed Decoding", arxiv="2405.18400")
    catalogue = (445,)
    needs = frozenset({Ability.MIXTURES})
    examples = ("superposed", "superposed:width=4,returned=4,alpha=0.5")

    def __post_init__(self) -> None:
        check_range(1, _WIDEST, self.name, width=self.width)
        check_range(1, self.width, self.name, returned=self.returned)
        check_range(0, 1, self.name, alpha=self.alpha)

    def _sides(self, request: Request) -> dict[Side, str]:
        """Return what this strategy and a request bring together."""
        return super()._sides(request) | {Side.SHARED_LOGITS_SEARCH: "the strategy superposed"}

    def run(self, task: Task) -> list[SearchOutput]:
        """Return the best `returned` continuations."""
        self.check(task)
        superposition = _Superposition(self, task)
        with Search(task) as search:
            superposition.grow(search)
        drafts = superposition.drafts[: self.returned]
        return [search.output(draft.tokens, draft.score, draft.ended) for draft in drafts]


class Ngrams:
    """N-gram model of given texts.

    Args:
        texts: token ids, each int32 [S].
    """

    def __init__(self, texts: Sequence[Tokens]) -> None:
        # -1 is no token: no n-gram reaches from one text into the next.
        parts = [part for text in texts for part in (text, np.array([-1], np.int32))]
        self._text = np.concatenate([np.array([-1], np.int32), *parts]).astype(np.int32)

    def probs(
        self, context: Tokens, tokens: Tokens, base: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the probabilities of `tokens` [K] after `context` [S].

        Each order is interpolated with the one below it: an order with c occurrences and d distinct
        successors has weight c / (c + d) (Witten and Bell). Below the lowest order lies `base` [K],
        which is all that remains where the context is unknown.
        """
        probs, text = base, self._text
        ends = np.arange(len(text) - 1)
        for back, token in enumerate(context[::-1][:_LONGEST].tolist()):
            ends = ends[ends >= back]
            ends = ends[text[ends - back] == token]
            followers = text[ends + 1]
            followers = followers[followers >= 0]
            if not len(followers):
                break
            kinds = len(np.unique(followers))
            counts = (followers[:, None] == tokens).sum(0)
            probs = (counts + kinds * probs) / (len(followers) + kinds)
        return probs


class _Draft(NamedTuple):
    """One continuation.

    Attributes:
        score: what drafts are kept by; once ranked, the model's log-probability.
        ended: by a stop token or stop string.
    """

    tokens: tuple[int, ...]
    score: float
    ended: bool = False


class _Superposition:
    """The drafts of one search, best first."""

    def __init__(self, settings: Superposed, task: Task) -> None:
        self._settings, self._task = settings, task
        self._prompt = np.array(task.request.prompt, np.int32)
        self._ngrams = Ngrams([*task.known_texts(), self._prompt])
        self.drafts = [_Draft((), 0.0)]

    def grow(self, search: Search) -> None:
        """Extend the drafts until all have ended or are as long as allowed; then rank them."""
        start = search.start()
        logits = search.next_logits([start])[0][None]
        search.engine.commit(start.sequence, [0])
        for left in range(self._task.limit, 0, -1):
            self.drafts = self.extended(logits)
            going = [draft for draft in self.drafts if not draft.ended]
            if not going or left == 1:
                break
            logits = search.forward_mixed(start, *_mixture(going))
            search.engine.commit(start.sequence, [0])
        search.engine.rewind(start.sequence, np.array(self._prompt[:-1], np.int32))
        scores = _model_scores(search, start, [draft.tokens for draft in self.drafts])
        ranked = [d._replace(score=score) for d, score in zip(self.drafts, scores, strict=True)]
        self.drafts = sorted(ranked, key=lambda draft: -draft.score)

    def extended(self, logits: Floats) -> list[_Draft]:
        """Return the best `width` among ended drafts and continuations by one token.

        `logits` [1, V] are those of the superposed node.
        """
        width, alpha = self._settings.width, self._settings.alpha
        best, probs = _native.top_k(logits, min(width, logits.shape[1]))
        tokens, base = best[0], np.maximum(probs[0].astype(np.float64), np.finfo(np.float32).tiny)
        drafts = [draft for draft in self.drafts if draft.ended]
        for draft in self.drafts:
            if draft.ended:
                continue
            context = np.append(self._prompt[-_LONGEST:], np.array(draft.tokens, np.int32))
            likely = self._ngrams.probs(context, tokens, base)
            scores = draft.score + (1 - alpha) * np.log(base) + alpha * np.log(likely)
            for token, score in zip(tokens.tolist(), scores.tolist(), strict=True):
                longer = (*draft.tokens, token)
                drafts.append(_Draft(longer, score, self._task.ends(longer)))
        return sorted(drafts, key=lambda draft: -draft.score)[:width]


def _mixture(drafts: list[_Draft]) -> tuple[Tokens, Floats]:
    """Return the drafts' last tokens [1, K] and weights [1, K] by the drafts' probabilities."""
    scores = np.array([draft.score for draft in drafts])
    weights = np.exp(scores - scores.max())
    tokens = np.array([[draft.tokens[-1] for draft in drafts]], np.int32)
    return tokens, (weights / weights.sum()).astype(np.float32)[None]


def _model_scores(search: Search, start: Hypothesis, texts: list[tuple[int, ...]]) -> list[float]:
    """Return the model's log-probability of each continuation, by one pass over all as a tree."""
    tokens, parents = [start.history[-1]], [-1]
    nodes: dict[tuple[int, ...], int] = {(): 0}
    for text in texts:
        for end in range(1, len(text)):  # the last token has no successor to score
            if text[:end] not in nodes:
                nodes[text[:end]] = len(tokens)
                parents.append(nodes[text[: end - 1]])
                tokens.append(text[end - 1])
    n = len(tokens)
    tree = TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.ones(n, np.float32),
        np.array([-1, *[0] * (n - 1)], np.int16),
    )
    logits = search.forward([(start, tree)]).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return [float(sum(logs[nodes[text[:i]], t] for i, t in enumerate(text))) for text in texts]
