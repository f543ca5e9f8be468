"""Scores continuations of contexts, many in one pass of the engine: a forest of trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.errors import RequestError
from paceline.kvcache.base import Policy
from paceline.scoring import check_finite, token_logprobs

_LOGITS = 1 << 25  # logits of a pass
_TOKENS = 512  # tokens of the contexts of a pass


class Branches(NamedTuple):
    """Continuations of one context.

    Attributes:
        context: token ids, at least one.
        continuations: token ids of each; one may be empty.
    """

    context: list[int]
    continuations: list[list[int]]

    @property
    def inner(self) -> int:
        """Upper bound of the nodes that are run for the continuations."""
        return 1 + sum(max(0, len(each) - 1) for each in self.continuations)


class BranchScore(NamedTuple):
    """How probable a continuation is.

    Attributes:
        logprobs: natural logarithm of each token's probability given what comes before, float64.
        firsts: whether each token is the most probable one.
    """

    logprobs: NDArray[np.float64]
    firsts: NDArray[np.bool_]

    @property
    def logprob(self) -> float:
        """Natural logarithm of the continuation's probability given the context."""
        return float(self.logprobs.sum())

    @property
    def greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return bool(self.firsts.all())

    def last(self, count: int) -> BranchScore:
        """Return the score of the last tokens."""
        return BranchScore(self.logprobs[-count:], self.firsts[-count:])


def score_branches(
    engine: Engine,
    groups: Sequence[Branches],
    policy: Policy | None = None,
    dense: bool = False,
) -> list[list[BranchScore]]:
    """Return the scores of the continuations of each context, in order.

    Contexts are read together; what continuations of one context share is run once.

    Args:
        engine: runs the model.
        groups: contexts with their continuations.
        policy: acts while contexts are read, up to the token before their last, and not behind.
        dense: contexts are read in full where an attention pattern lets prompts read blocks.

    Raises:
        RequestError: a context is empty or longer than the model sees, with its continuations.
        MethodError: the engine lacks what the policy needs.
        ModelError: the model's logits are not finite.
    """
    if policy is not None:
        policy.check(engine)
    blocks = engine.pattern is not None and engine.pattern.sparse_prefill is not None
    limit = engine.config.context
    for context, continuations in groups:
        size = len(context) + max(map(len, continuations), default=0)
        if not context or size > limit + 1:
            raise RequestError(f"a text has {size} tokens, expected 1 to {limit + 1}")
    scores: list[list[BranchScore]] = []
    for batch in _batches(groups, engine.config.vocab_size):
        sequences = [engine.open() for _ in batch]
        try:
            contexts = [group.context[:-1] for group in batch]
            for sequence, context in zip(sequences, contexts, strict=True):
                engine.set_prompt(sequence, 0 if blocks and dense else len(context))
            _read(engine, sequences, contexts, policy)
            scores += score_sequences(engine, sequences, batch)
        finally:
            for sequence in sequences:
                engine.release(sequence)
    return scores


def score_decoded(
    engine: Engine,
    context: list[int],
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    dense: bool = False,
) -> list[BranchScore]:
    """Return the scores of answers behind prompts that begin alike, as plain decoding reads them.

    Where an attention pattern reads few positions behind a prompt, only tokens of the answers do.

    Args:
        engine: runs the model.
        context: that all prompts begin with, run once.
        prompts: what follows it in each, at least one token.
        answers: behind each, at least one token.
        dense: answers read everything, too.
    """
    shared, scores = engine.open(), []
    try:
        engine.set_prompt(shared, len(context))
        _read(engine, [shared], [context], None)
        for prompt, answer in zip(prompts, answers, strict=True):
            sequence = engine.fork(shared)
            try:
                end = len(context) + len(prompt) - 1
                engine.set_prompt(sequence, engine.config.context if dense else end)
                _read(engine, [sequence], [prompt[:-1]], None)
                [[score]] = score_sequences(engine, [sequence], [Branches(prompt[-1:], [answer])])
                scores.append(score)
            finally:
                engine.release(sequence)
    finally:
        engine.release(shared)
    return scores


def _batches(groups: Sequence[Branches], vocab_size: int) -> Iterator[list[Branches]]:
    """Yield groups that fit into a pass; one that does not is alone."""
    batch: list[Branches] = []
    rows = tokens = 0
    for group in groups:
        rows, tokens = rows + group.inner, tokens + len(group.context)
        if batch and (rows * vocab_size > _LOGITS or tokens > _TOKENS):
            yield batch
            batch, rows, tokens = [], group.inner, len(group.context)
        batch.append(group)
    if batch:
        yield batch


def _read(
    engine: Engine,
    sequences: Sequence[Cached],
    contexts: Sequence[list[int]],
    policy: Policy | None,
) -> None:
    """Commit a context to each sequence; no logits are computed."""
    if policy is not None:
        for sequence in sequences:
            policy.begin(engine, sequence)
    begin, longest = 0, max(map(len, contexts))
    while begin < longest:
        step = _TOKENS if policy is None else min(_TOKENS, policy.distance(begin))
        parts = [
            (sequence, TokenTree.chain(context[begin : begin + step]))
            for sequence, context in zip(sequences, contexts, strict=True)
            if len(context) > begin
        ]
        engine.forward(parts, "none")
        for sequence, tree in parts:
            engine.commit(sequence, np.arange(len(tree), dtype=np.int32))
            if policy is not None:
                policy.act(engine, sequence)
        begin += step


def score_sequences(
    engine: Engine, sequences: Sequence[Cached], groups: Sequence[Branches]
) -> list[list[BranchScore]]:
    """Return the scores of continuations, in order.

    Args:
        engine: runs the model.
        sequences: hold the contexts but for their last tokens.
        groups: of the contexts only the last tokens are read.
    """
    plans = [_tree(group) for group in groups]
    trees = [tree for tree, _ in plans]
    logits = engine.forward(list(zip(sequences, trees, strict=True)))
    scores, offset = [], 0
    for group, (tree, paths) in zip(groups, plans, strict=True):
        rows = logits[offset : offset + len(tree)]
        offset += len(tree)
        scores.append(
            [
                _branch_score(rows[path], each)
                for path, each in zip(paths, group.continuations, strict=True)
            ]
        )
    return scores


def _branch_score(rows: Floats, tokens: list[int]) -> BranchScore:
    if not tokens:
        return BranchScore(np.zeros(0), np.zeros(0, np.bool_))
    ids = np.array(tokens, np.int32)
    logprobs = token_logprobs(rows, ids)
    check_finite(logprobs.tolist())
    return BranchScore(logprobs, rows.argmax(axis=1) == ids)


def _tree(group: Branches) -> tuple[TokenTree, list[list[int]]]:
    """Return the tree of all continuations, and for each the nodes that predict its tokens."""
    tokens, parents = [group.context[-1]], [-1]
    children: dict[tuple[int, int], int] = {}
    paths = []
    for continuation in group.continuations:
        path = [0] if continuation else []
        for token in continuation[:-1]:
            node = children.setdefault((path[-1], token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(path[-1])
            path.append(node)
        paths.append(path)
    ones, origins = np.ones(len(tokens), np.float32), np.zeros(len(tokens), np.int16)
    origins[0] = -1
    tree = TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), ones, origins)
    return tree, paths
