"""What each KV policy leaves of a long context, beside rows that are drawn.

    python benchmarks/long_context.py MODEL [--data FOLDER] [--context 2048] [--contexts 20]
        [--policies NAME ...] [--removed 0.5 0.75] [--kinds single multikey copy] [--once]
        [--cache FILE]

The contexts are those of `paceline eval --suite long`. A policy keeps (1 - removed) of the rows on
average over all heads, but for those that choose how many, of which the share is measured. The gain
kept is that of the suite, over all contexts of a kind; behind it stands its difference from
`random` at the same share with a paired 95 % bootstrap interval over contexts, and `=` where that
holds 0: the policy is not shown to beat the draw. Every result is kept in the file, with which an
interrupted run goes on. With `--once` a policy evicts behind the whole context instead of all
along, so that one prefill serves all policies and a context takes a fifth of the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline import LM
from paceline.core import Floats
from paceline.engines.base import Cached
from paceline.engines.wrapper import EngineWrapper
from paceline.kvcache.base import Policy, parse_policy
from paceline.measuring.evaluation.forest import Branches, score_sequences
from paceline.measuring.evaluation.long_context import KINDS, LongContexts, score_answers
from paceline.measuring.evaluation.long_tasks import LongContext
from paceline.measuring.evaluation.prefix import prefix_tokens

SHARED = Path(__file__).resolve().parents[2] / "shared"
FLOOR = "random"
POLICIES = (
    FLOOR, "sliding_window", "h2o", "snapkv", "tova", "knorm", "keydiff", "expected_attention",
    "sirllm", "adakv", "zipvl", "fastgen", "light_transfer", "retrieval_heads",
)  # fmt: skip
_LAZY_ROWS = 128  # of lazy layers, which decide how many layers are lazy
_EVERY = 256  # positions between two evictions, so that a context takes seconds
_RESAMPLES = 2000


class CountingEngine(EngineWrapper):
    """Notes the share of rows that sequences hold when they are released.

    Attributes:
        share: of the sequence that was released last.
        window: number of recent queries that a policy is shown; None: all that are tracked.
    """

    share = 1.0
    window: int | None = None

    def recent_queries(self, sequence: Cached, layer: int) -> Floats:
        """Return the last `window` queries."""
        queries = super().recent_queries(sequence, layer)
        return queries if self.window is None else queries[:, -self.window :]

    def release(self, sequence: Cached) -> None:
        """Note the share, and release the sequence."""
        if sequence.length:
            layers = range(len(self.config.layers))
            held = [(self.inner.rows(sequence, index) >= 0).sum(1) for index in layers]
            self.share = float(np.concatenate(held).mean() / sequence.length)
        super().release(sequence)


def spec_of(name: str, removed: float, context: int, every: int) -> str:
    """Return a policy that keeps about the wanted share of a context."""
    budget = max(8, round((1 - removed) * context))
    if name == "light_transfer":
        lazy = min(1.0, removed / (1 - _LAZY_ROWS / context))
        return f"light_transfer:budget={_LAZY_ROWS},lazy={lazy:.3f},every={every}"
    if name == "fastgen":
        window = max(1, budget // 4)
        return f"fastgen:budget={budget},window={window},recovery={1 - removed / 2:g},every={every}"
    recent = {"sliding_window": "", "tova": ""}.get(name, f",recent={min(64, budget // 4)}")
    return f"{name}:budget={budget}{recent},every={every}"


def measure(
    lm: LM,
    engine: CountingEngine,
    suite: LongContexts,
    kind: str,
    number: int,
    specs: list[str],
    known: dict[str, Any],
) -> None:
    """Add the log-probabilities of one context's answers to what is known of it."""
    [item] = [item for item in suite.items if item.content == (kind, number)]
    context = suite.context(lm, item)
    for name, before in (("full", context.tokens), ("none", prefix_tokens(lm, "auto"))):
        if name not in known:
            scores = score_answers(engine, before, context, None)
            known[name] = sum(score.logprob for score in scores)
    for spec in specs:
        if spec not in known:
            scores = score_answers(engine, context.tokens, context, parse_policy(spec))
            known[spec] = [sum(score.logprob for score in scores), engine.share]


def measure_once(
    lm: LM,
    engine: CountingEngine,
    suite: LongContexts,
    kind: str,
    number: int,
    specs: list[str],
    known: dict[str, Any],
) -> None:
    """Add the same of policies that evict once, behind the whole context, which is read once."""
    [item] = [item for item in suite.items if item.content == (kind, number)]
    context, engine.window = suite.context(lm, item), None
    if "none" not in known:
        scores = score_answers(engine, prefix_tokens(lm, "auto"), context, None)
        known["none"] = sum(score.logprob for score in scores)
    policies = {spec: parse_policy(spec) for spec in specs if spec not in known}
    if not policies and "full" in known:
        return
    sequence = engine.open()
    for policy in policies.values():
        policy.check(engine)
    engine.track_attention(sequence)
    engine.track_surprisal(sequence)
    windows = [policy.query_window for policy in policies.values()]
    engine.track_queries(sequence, min(max(windows, default=1), engine.config.context))
    engine.extend(sequence, np.array(context.tokens, np.int32))
    if "full" not in known:
        known["full"] = _score_behind(engine, sequence, context, None)[0]
    for spec, policy in policies.items():
        known[spec] = _score_behind(engine, sequence, context, policy)
    engine.release(sequence)


def _score_behind(
    engine: CountingEngine, context_sequence: Cached, context: LongContext, policy: Policy | None
) -> list[float]:
    """Return the log-probability of a context's answers, and the share of rows that are kept."""
    sequence = engine.fork(context_sequence)
    if policy is not None:
        engine.window = policy.query_window
        policy.act(engine, sequence)
    mark = context.questions[0].tokens[:1]
    group = Branches(mark, [question.tokens[1:] for question in context.questions])
    [scores] = score_sequences(engine, [sequence], [group])
    engine.release(sequence)
    questions = zip(scores, context.questions, strict=True)
    return [sum(score.last(question.answer).logprob for score, question in questions), engine.share]


def interval(gains: np.ndarray, floor: np.ndarray, whole: np.ndarray) -> tuple[float, float, float]:
    """Return the difference of two gains kept, and its 95 % interval over paired contexts."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(whole), (_RESAMPLES, len(whole)))
    differences = (gains - floor)[drawn].sum(1) / whole[drawn].sum(1)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float((gains - floor).sum() / whole.sum()), float(low), float(high)


def cell(known: list[dict[str, Any]], spec: str, floor: str) -> tuple[str, float]:
    """Return what a table says of a policy and a kind, and the share of rows that it keeps."""
    none = np.array([each["none"] for each in known])
    whole = np.array([each["full"] for each in known]) - none
    gains, floors = (np.array([each[name][0] for each in known]) - none for name in (spec, floor))
    share = float(np.mean([each[spec][1] for each in known]))
    kept = f"{gains.sum() / whole.sum():.2f}"
    if spec == floor:
        return kept, share
    difference, low, high = interval(gains, floors, whole)
    equal = " =" if low <= 0 <= high else ""
    return f"{kept} ({difference:+.2f}, {low:+.2f} to {high:+.2f}{equal})", share


def report(
    results: dict[str, Any],
    policies: list[str],
    removed: float,
    context: int,
    kinds: Sequence[str],
    every: int,
) -> None:
    """Print the table of one share; contexts that lack a policy do not count for it."""
    print(f"\n{removed:.0%} removed\n\n| policy | rows | n | {' | '.join(kinds)} |")
    print("|---|---|---|" + "---|" * len(kinds))
    floor = spec_of(FLOOR, removed, context, every)
    for name in policies:
        spec, cells, shares, counts = spec_of(name, removed, context, every), [], [], []
        for kind in kinds:
            rows = [own for key, own in results.items() if key.startswith(f"{kind}/")]
            known = [own for own in rows if {"full", "none", spec, floor} <= set(own)]
            text, share = cell(known, spec, floor) if known else ("", float("nan"))
            cells.append(text)
            counts.append(len(known))
            shares.append(share)
        print(f"| {name} | {np.nanmean(shares):.2f} | {min(counts)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=SHARED / "text")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=20)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--removed", type=float, nargs="+", default=(0.5, 0.75))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    policies = list(dict.fromkeys([FLOOR, *options.policies]))
    every, measure_context = (1, measure_once) if options.once else (_EVERY, measure)
    results: dict[str, Any] = {}
    if options.cache and options.cache.exists():
        results = json.loads(options.cache.read_text())
    suite = LongContexts(options.data, options.contexts, options.context)
    with LM(options.model, threads=options.threads) as lm:
        engine = CountingEngine(lm.engine)
        for number in range(options.contexts):
            specs = [
                spec_of(name, removed, options.context, every)
                for removed in options.removed
                for name in policies
            ]
            for kind in options.kinds:
                known = results.setdefault(f"{kind}/{number}", {})
                measure_context(lm, engine, suite, kind, number, specs, known)
                if options.cache:
                    options.cache.write_text(json.dumps(results))
    for removed in options.removed:
        report(results, policies, removed, options.context, options.kinds, every)


if __name__ == "__main__":
    main()
