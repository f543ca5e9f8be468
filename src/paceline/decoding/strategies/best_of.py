"""The best of several samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from paceline.compatibility import Side
from paceline.control.capabilities import LowEntropy
from paceline.core import Exactness, Floats, Request
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.session import Session, give_hidden
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.hypotheses.search import Hypothesis, Search, branching
from paceline.drafters.base import Drafter, Target
from paceline.registry import Source, check_range, drafters, strategies

_MOST = 1024


def comparison_sides(request: Request, count: int) -> dict[Side, str]:
    """Return what a request and a choice among `count` answers to it bring together."""
    if count < 2:
        return {}
    sides = {Side.COMPARED_ANSWERS: f"the best of {count} answers"}
    if request.temperature == 0:
        sides[Side.GREEDY] = "temperature 0"
    if any(isinstance(each, LowEntropy) for each in request.controls):
        sides[Side.DETERMINING_WATERMARK] = "this watermark"
    return sides


@strategies.register("best_of", Exactness.LOSSY)
@dataclass(frozen=True)
class BestOf(Strategy):
    """Draw `n` samples and keep the best.

    Sample i is, token for token, what plain decoding gives with seed + i; only the choice is
    lossy. `together` samples share each pass, and each has a drafter of its own that learns with
    the others where the method can. A fixed budget applies to each tree; auto is shared by all
    trees of a pass, and so are the passes of guides.

    The score of a sample is the mean log-probability of its tokens under the model without
    controls; from Python, `scorer` may rank by the text instead.

    Cost: `n` samples, `together` of them for little more than one. Memory: `together` + 1 caches,
    and as many drafters.
    Good for: answers whose quality can be scored.

    Attributes:
        n: samples, 1 to 1024. Default 8.
        returned: outputs given, 1 to `n`. Default 1.
        together: samples that share a pass, 1 to 1024. Default 8.
        scorer: text -> score, higher is better. From Python only.
    """

    n: int = 8
    returned: int = 1
    together: int = 8
    scorer: Callable[[str], float] | None = field(default=None, repr=False)

    draws = True
    examples = ("best_of:n=3,returned=2",)
    source = Source(
        authors="Stiennon et al.",
        title="Learning to summarize from human feedback",
        arxiv="2009.01325",
    )

    def __post_init__(self) -> None:
        check_range(1, _MOST, self.name, n=self.n, together=self.together)
        check_range(1, self.n, self.name, returned=self.returned)

    @property
    def drafts(self) -> bool:
        """Whether it uses the walk: samples do."""
        return True

    def _sides(self, request: Request) -> dict[Side, str]:
        """Return what this strategy and a request bring together."""
        return super()._sides(request) | comparison_sides(request, self.n)

    def run(self, task: Task) -> list[SearchOutput]:
        """Return the best `returned` samples."""
        self.check(task)
        seeds = range(task.request.seed, task.request.seed + self.n)
        samples: list[SearchOutput] = []
        with Search(task) as search:
            prompt = search.start()
            sample_drafters = _sample_drafters(task, min(self.n, self.together))
            for at in range(0, self.n, self.together):
                some = seeds[at : at + self.together]
                requests = [search.branch(task.seeded(seed), prompt) for seed in some]
                samples += _side_by_side(search, prompt, requests, sample_drafters, first=at == 0)
                if search.interrupted:
                    break
        for sample in samples:
            sample.passes, sample.nodes = search.cost.passes, search.cost.nodes
            sample.seconds = replace(search.cost.seconds)
            if self.scorer is not None:
                sample.score = self.scorer(sample.text)
        samples.sort(key=lambda sample: -sample.score)
        return samples[: self.returned]


def _sample_drafters(task: Task, count: int) -> list[Drafter]:
    """Return a drafter for each sample of a pass."""
    plain = drafters.parse("plain")
    target = Target(task.engine.config.vocab_size)
    if task.drafter is None:
        return [plain.build(target) for _ in range(count)]
    another = task.another or (lambda: plain.build(target))
    return [task.drafter, *(another() for _ in range(count - 1))]


def _side_by_side(
    search: Search,
    prompt: Hypothesis,
    requests: list[Request],
    sample_drafters: list[Drafter],
    first: bool,
) -> list[SearchOutput]:
    """Draw one sample for each request, all of them in each pass.

    In the `first` batch, one sample runs the prompt again, so that its drafter can learn from it.
    """
    task, engine = search.task, search.engine
    budget: Budget = task.budget if task.drafter is not None else Fixed(0)
    sessions = [
        Session(engine, drafter, request, task.stream() if task.stream else None)
        for drafter, request in zip(sample_drafters, requests, strict=False)
    ]
    scores = dict.fromkeys(map(id, sessions), 0.0)
    try:
        for each in sessions:
            anew = first and each is sessions[0] and each.wants_prefill_logits
            each.open(None if anew else engine.fork(prompt.sequence))
            while each.missing:
                assert each.sequence is not None
                part = each.next_part()
                each.commit_part(part, engine.forward([(each.sequence, part)]))
            if budget.nodes_wanted(len(sessions)):
                each.read_prompt()
            each.begin_guides()
        while live := [each for each in sessions if not each.done]:
            for each, score in zip(live, _pass(search, live, budget), strict=True):
                scores[id(each)] += score
                if each.done:
                    each.close()
    except KeyboardInterrupt:
        search.interrupted = True
    finally:
        for each in sessions:
            each.close()
    outputs = []
    for each in sessions:
        output = each.output
        if not output.tokens:
            continue
        sample = search.output(output.tokens, scores[id(each)] / len(output.tokens), False)
        sample.text, sample.accepted = output.text, output.accepted
        sample.finish = output.finish if each.done else "interrupted"
        outputs.append(sample)
    return outputs


def _pass(search: Search, live: Sequence[Session], budget: Budget) -> list[float]:
    """Run one pass of several samples; return the sum of log-probabilities of each one's tokens."""
    begun = perf_counter()
    nodes = budget.nodes_wanted(len(live))
    forced_nodes, min_path_prob = 0 if nodes else budget.nodes_for_forced(), budget.min_path_prob()
    trees = [each.propose(nodes, forced_nodes, min_path_prob) for each in live]
    if nodes:
        trees = budget.prune(trees, perf_counter() - begun)
    drafted = perf_counter()
    logits = search.forward([(_hypothesis(e), tree) for e, tree in zip(live, trees, strict=True)])
    passed = perf_counter()
    rows = np.split(logits, np.cumsum([len(tree) for tree in trees])[:-1])
    give_hidden(search.task.engine, live, [len(tree) for tree in trees])
    walked = [each.verify(tree, own) for each, tree, own in zip(live, trees, rows, strict=True)]
    scored = [_log_probs(own, w.path, w.drawn) for own, w in zip(rows, walked, strict=True)]
    learning = perf_counter()
    for each, tree, own, w in zip(live, trees, rows, walked, strict=True):
        each.learn(tree, own, w)
    draft = drafted - begun + perf_counter() - learning if nodes else 0.0
    budget.record(trees, [w.path for w in walked], draft, passed - drafted)
    search.cost.seconds.draft += draft
    search.cost.seconds.walk += learning - passed
    totals = []
    for each, tree, w, log_probs in zip(live, trees, walked, scored, strict=True):
        before = len(each.output.tokens)
        each.accept(tree, w)
        totals.append(sum(log_probs[: len(each.output.tokens) - before]))
    return totals


def _hypothesis(each: Session) -> Hypothesis:
    """Return a sample's text so far as a hypothesis."""
    assert each.sequence is not None
    return Hypothesis(each.text.tolist(), 0.0, each.sequence, branching(each.guides))


def _log_probs(logits: Floats, path: Sequence[int], drawn: Sequence[int]) -> list[float]:
    """Return the log-probability, in nats, of each token drawn on a path."""
    log_probs = []
    for node, token in zip(path, drawn, strict=True):
        wide = logits[node].astype(np.float64) - float(logits[node].max())
        log_probs.append(float(wide[token] - np.log(np.exp(wide).sum())))
    return log_probs
