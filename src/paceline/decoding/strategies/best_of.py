"""The best of several samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from paceline.core import Exactness, Request, TokenTree
from paceline.decoding.strategies.base import Found, Hypothesis, Search, Strategy, Task
from paceline.decoding.walk import draw
from paceline.drafters.base import within
from paceline.registry import strategies

_MOST = 1024
_CHUNK = 64  # tokens of a sample that are scored in one pass


@strategies.register("best_of", Exactness.LOSSY)
@dataclass(frozen=True)
class BestOf(Strategy):
    """Draw `n` samples and keep the best.

    Sample i is, token for token, what plain decoding gives with seed + i; only the choice is
    new. `together` samples share each pass, which drafts nothing: many rows are already there to
    fill it. With `together=1` they come one after the other, each drafted as usual, and the
    drafter learns from one for the next.

    The score of a sample is the mean log chance that the model itself, without controls, gives
    its tokens; from Python, `scorer` may rank by the text instead.

    Cost: `n` samples, `together` of them for little more than one. Memory: `together` caches.
    Good for: answers that can be judged.

    Attributes:
        n: samples, 1 to 1024. Default 8.
        returned: outputs given, 1 to `n`. Default 1.
        together: samples in a pass, 1 to 1024. Default 8.
        scorer: text -> score, the higher the better. From Python only.
    """

    n: int = 8
    returned: int = 1
    together: int = 8
    scorer: Callable[[str], float] | None = field(default=None, repr=False)

    draws = True
    paper = "Stiennon et al., Learning to summarize from human feedback, arXiv 2009.01325"

    def __post_init__(self) -> None:
        within(1, _MOST, self.name, n=self.n, together=self.together)
        within(1, self.n, self.name, returned=self.returned)

    @property
    def drafts(self) -> bool:
        """One at a time they go through the walk."""
        return self.together == 1

    def run(self, task: Task) -> list[Found]:
        """The best `returned` samples."""
        self.check(task)
        first = task.request.seed
        seeds = list(range(first, first + self.n))
        samples: list[Found] = []
        with Search(task) as run:
            prompt = run.start()
            for at in range(0, self.n, self.together):
                requests = [task.seeded(seed) for seed in seeds[at : at + self.together]]
                if task.drafter is not None and self.drafts:
                    samples.append(_drafted(run, prompt, requests[0]))
                    stopped = samples[-1].finish == "interrupted"
                else:
                    stopped = _side_by_side(run, prompt, requests, samples)
                if stopped:
                    run.interrupted = True
                    break
        for sample in samples:
            sample.passes, sample.nodes = run.cost.passes, run.cost.nodes
            sample.seconds = replace(run.cost.seconds)
            if self.scorer is not None:
                sample.score = self.scorer(sample.text)
        samples.sort(key=lambda sample: -sample.score)
        return samples[: self.returned]


def _side_by_side(
    run: Search, prompt: Hypothesis, requests: list[Request], samples: list[Found]
) -> bool:
    """One sample for each request, all of them in each pass; whether Ctrl-C ended them."""
    task, start = run.task, len(prompt.history)
    live = [Hypothesis(list(prompt.history), 0.0, run.fork(prompt.sequence)) for _ in requests]
    waiting = dict(zip(map(id, live), requests, strict=True))
    ended: dict[int, bool] = {}
    order = list(live)
    try:
        while live:
            logits = run.look(live)
            for row, sample in zip(logits, list(live), strict=True):
                token, _ = draw(row, sample.history, waiting[id(sample)])
                run.engine.commit(sample.sequence, [0])
                sample.score += _chance(row, token)
                sample.history.append(token)
                ends = task.ends(sample.history[start:])
                if ends or len(sample.history) - start >= task.limit:
                    ended[id(sample)] = ends
                    live.remove(sample)
                    run.release(sample.sequence)
    except KeyboardInterrupt:
        run.interrupted = True
    for sample in order:
        tokens = sample.history[start:]
        if tokens:
            mean = sample.score / len(tokens)
            samples.append(run.found(tokens, mean, ended.get(id(sample), False)))
    return run.interrupted


def _drafted(run: Search, prompt: Hypothesis, request: Request) -> Found:
    """One sample through the loop."""
    output = run.decode(request, prompt.sequence)
    return Found(
        tokens=output.tokens,
        text=output.text,
        finish=output.finish,
        accepted=output.accepted,
        reading=request.reading,
        score=_mean_chance(run, prompt, output.tokens),
    )


def _mean_chance(run: Search, prompt: Hypothesis, tokens: list[int]) -> float:
    """Mean log chance of `tokens` after the prompt, by passes over many of them at once."""
    if not tokens:
        return -np.inf
    sequence = run.fork(prompt.sequence)
    text, total = [prompt.history[-1], *tokens], 0.0
    for at in range(0, len(tokens), _CHUNK):
        tree = TokenTree.chain(text[at : at + _CHUNK][: len(tokens) - at])
        logits = run.forward([(sequence, tree)])
        total += sum(_chance(row, text[at + i + 1]) for i, row in enumerate(logits))
        run.engine.commit(sequence, np.arange(len(tree)))
    run.release(sequence)
    return total / len(tokens)


def _chance(logits: np.ndarray, token: int) -> float:
    """Log chance of one token, in nats."""
    wide = logits.astype(np.float64) - float(logits.max())
    return float(wide[token] - np.log(np.exp(wide).sum()))
