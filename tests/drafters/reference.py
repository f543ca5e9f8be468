"""What the native drafters mean, in plain Python: no hashing, no speed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.core import Step

Context = tuple[int, ...]
Probs = dict[int, Any]
FLOOR, LARGEST, MOST = 0.002, 8.0, 32


@dataclass
class Row:
    """A context's likeliest successors, best first."""

    count: int = 0
    probs: Probs = field(default_factory=dict)

    def observe(self, seen: Iterable[tuple[int, float]], k: int, keep: float) -> None:
        # In float32, so that equals stay equal.
        one = np.float32(1)
        old = min(np.float32(keep), np.float32(self.count) / np.float32(self.count + 1))
        merged = {token: p * old for token, p in self.probs.items()}
        for token, p in seen:
            merged[token] = merged.get(token, np.float32(0)) + np.float32(p) * (one - old)
        merged = {token: p for token, p in merged.items() if p > 0}
        best = sorted(merged.items(), key=lambda item: (-item[1], item[0]))[:k]
        self.probs, self.count = dict(best), self.count + 1


def grow(
    context: Context, budget: int, successors: Callable[[Context], Probs]
) -> list[tuple[int, int, float]]:
    """Nodes (token, parent, probability) of the tree of the likeliest paths."""
    nodes, paths, texts = [(context[-1], -1, 1.0)], [1.0], [context]
    open_: list[tuple[float, int, int, float]] = []
    while len(nodes) <= budget:
        node = len(nodes) - 1
        for token, probability in successors(texts[node]).items():
            heapq.heappush(open_, (-paths[node] * probability, node, token, probability))
        if not open_:
            break
        path, parent, token, probability = heapq.heappop(open_)
        nodes.append((token, parent, probability))
        paths.append(-path)
        texts.append((*texts[parent], token))
    return nodes


class Mixer:
    """`native/drafting/context_mixer.hpp`."""

    def __init__(self, orders: int, skips: int, k: int, keep: float, rate: float) -> None:
        self.orders, self.skips, self.k, self.keep, self.rate = orders, skips, k, keep, rate
        self.rows: dict[tuple[int, Context], Row] = {}
        self.w: dict[tuple[int, int, int], float] = {}
        self.v: dict[tuple[int, int, int], float] = {}
        self.bias: dict[int, float] = {}

    def contexts(self, text: Context) -> list[tuple[int, Context]]:
        """The contexts that `text` ends in, the vaguest first."""
        found: list[tuple[int, Context]] = [(0, ())]
        for i in range(1, self.skips + 1):
            back = self.skips + 2 - i
            if back <= len(text):
                found.append((i, (text[-back],)))
        for n in range(1, self.orders + 1):
            if n <= len(text):
                found.append((self.skips + n, text[-n:]))
        return found

    def start(self, lead: int, context: int) -> float:
        return 0.1 if context <= self.skips else 0.7 * 0.5 ** max(lead - context, 0)

    def evidence(self, text: Context) -> tuple[int, list[tuple[tuple[int, int, int], Row]]]:
        known = [(c, self.rows[c, t]) for c, t in self.contexts(text) if (c, t) in self.rows]
        lead = known[-1][0] if known else -1
        bucket = [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
        return lead, [
            ((lead, c, bucket[row.count] if row.count < 10 else 3), row)
            for c, row in reversed(known)
        ]

    def probs(self, text: Context) -> tuple[Probs, float]:
        """Of each candidate, and of another token."""
        lead, rows = self.evidence(text)
        scores: Probs = {}
        other = self.bias.get(lead, 0.0)
        for at, row in rows:
            w, v = self.w.get(at, self.start(lead, at[1])), self.v.get(at, 0.1)
            for i, (token, p) in enumerate(row.probs.items()):
                if token in scores or len(scores) < MOST:
                    add = w * math.log1p(p / FLOOR) + v * (i == 0)
                    scores[token] = scores.get(token, 0.0) + add
            other += w * math.log1p(max(1 - sum(row.probs.values()), 0.0) / FLOOR)
        total = math.exp(other) + sum(map(math.exp, scores.values()))
        return {t: math.exp(s) / total for t, s in scores.items()}, math.exp(other) / total

    def learn(self, text: Context, drawn: int) -> None:
        lead, rows = self.evidence(text)
        probs, other = self.probs(text)

        def moved(value: float, gradient: float) -> float:
            step = self.rate / max(len(rows), 1) * gradient
            return max(-LARGEST, min(LARGEST, value + step))

        missed = drawn not in probs
        for at, row in rows:
            rest = max(1 - sum(row.probs.values()), 0.0)
            gradient = (missed - other) * math.log1p(rest / FLOOR)
            first = 0.0
            for i, (token, p) in enumerate(row.probs.items()):
                if token in probs:
                    error = (token == drawn) - probs[token]
                    gradient += error * math.log1p(p / FLOOR)
                    first += error * (i == 0)
            self.w[at] = moved(self.w.get(at, self.start(lead, at[1])), gradient)
            self.v[at] = moved(self.v.get(at, 0.1), first)
        self.bias[lead] = moved(self.bias.get(lead, 0.0), missed - other)

    def observe(self, step: Step, learn: bool) -> None:
        texts = [tuple(step.context.tolist())]
        for token, parent in zip(step.tree.tokens[1:], step.tree.parents[1:], strict=True):
            texts.append((*texts[parent], int(token)))
        drawn = dict(zip(step.path.tolist(), step.drawn.tolist(), strict=True))
        for node, text in enumerate(texts):
            if learn and node in drawn:
                self.learn(text, drawn[node])
            seen = list(
                zip(step.top_tokens[node].tolist(), step.top_probs[node].tolist(), strict=True)
            )
            for context in self.contexts(text):
                self.rows.setdefault(context, Row()).observe(seen, self.k, self.keep)

    def propose(self, context: Context, budget: int) -> list[tuple[int, int, float]]:
        return grow(context, budget, lambda text: self.probs(text)[0])


class Lookup:
    """`native/drafting/ngram_index.hpp`, the index made anew for every guess."""

    def __init__(self, longest: int, k: int, keep: float, rate: float) -> None:
        self.longest, self.k, self.keep, self.rate = longest, k, keep, rate
        doubts = [0.7 / 2**n for n in range(longest)]
        self.reliability = [1 - doubt for doubt in doubts]

    def index(self, text: Context) -> dict[Context, Row]:
        rows: dict[Context, Row] = {}
        for at in range(len(text)):
            for n in range(1, min(self.longest, at) + 1):
                row = rows.setdefault(text[at - n : at], Row())
                row.observe([(text[at], 1.0)], self.k, self.keep)
        return rows

    def by_length(self, rows: dict[Context, Row], text: Context) -> list[tuple[int, Probs]]:
        """The longest match first; each with the tokens no longer one names."""
        named: set[int] = set()
        found = []
        for n in range(min(self.longest, len(text)), 0, -1):
            row = rows.get(text[-n:], Row())
            new = {token: p for token, p in row.probs.items() if token not in named}
            if new:
                found.append((n, new))
                named |= new.keys()
        return found

    def probs(self, rows: dict[Context, Row], text: Context) -> Probs:
        probs: Probs = {}
        left = 1.0
        for n, new in self.by_length(rows, text):
            share = left * self.reliability[n - 1]
            probs |= {token: share * p / sum(new.values()) for token, p in new.items()}
            left *= 1 - self.reliability[n - 1]
        return probs

    def learn(self, text: Context, prompt: int) -> None:
        """From every token behind the prompt."""
        for at in range(prompt, len(text)):
            for n, new in self.by_length(self.index(text[:at]), text[:at]):
                hit = text[at] in new
                self.reliability[n - 1] += self.rate * (hit - self.reliability[n - 1])
                if hit:
                    break

    def propose(self, text: Context, budget: int) -> list[tuple[int, int, float]]:
        rows = self.index(text)
        return grow(text, budget, lambda context: self.probs(rows, context))


class Suffix:
    """`suffix_automaton.hpp` while nothing has aged: each string is searched for in all texts."""

    LEVELS = 4

    def __init__(self, k: int, rate: float) -> None:
        self.k, self.rate = k, rate
        self.texts: list[Context] = []
        self.reliability = [1 - 0.7 / 2 ** (kind // 3) for kind in range(21)]

    def occurrences(self, string: Context) -> list[tuple[int, int]]:
        """Where `string` stands: the text, and the place behind it, in the order of reading."""
        n = len(string)
        return [
            (at, end)
            for at, text in enumerate(self.texts)
            for end in range(n, len(text) + 1)
            if text[end - n : end] == string
        ]

    def voices(self, context: Context) -> list[tuple[int, Probs]]:
        """The matches of falling length, as kind and shares."""
        named: set[int] = set()
        found: list[tuple[int, Probs]] = []
        before: list[tuple[int, int]] = []
        for n in range(len(context), 0, -1):
            places = self.occurrences(context[-n:])
            if places == before or len(found) == self.LEVELS:
                continue
            before = places
            followed: dict[int, int] = {}
            for at, end in places:
                if end < len(self.texts[at]):
                    token = self.texts[at][end]
                    followed[token] = followed.pop(token, 0) + 1  # the latest comes last
            latest = dict(list(reversed(followed.items()))[: self.k])
            new = {token: count for token, count in latest.items() if token not in named}
            if new:
                named |= new.keys()
                total = sum(new.values())
                shares = {token: count / total for token, count in new.items()}
                found.append((self.kind(n, sum(latest.values())), shares))
        return found

    @staticmethod
    def kind(length: int, count: int) -> int:
        by_length = next(i for i, most in enumerate((1, 2, 3, 5, 9, 19, 10**9)) if length <= most)
        return 3 * by_length + (count >= 2) + (count >= 4)

    def probs(self, context: Context) -> Probs:
        probs: Probs = {}
        left = 1.0
        for kind, shares in self.voices(context):
            reliable = self.reliability[kind]
            probs |= {token: share * left * reliable for token, share in shares.items()}
            left *= 1 - reliable
        return probs

    def read(self, text: Context, prompt: int) -> None:
        """A new text, token by token; those behind the prompt teach."""
        self.texts.append(())
        for at, token in enumerate(text):
            if at >= prompt:
                for kind, shares in self.voices(text[:at]):
                    hit = token in shares
                    self.reliability[kind] += self.rate * (hit - self.reliability[kind])
                    if hit:
                        break
            self.texts[-1] = text[: at + 1]

    def propose(self, text: Context, budget: int) -> list[tuple[int, int, float]]:
        return grow(text, budget, self.probs)


def escaped(
    groups: Iterable[tuple[Any, list[tuple[int, float]]]], reliability: dict[Any, float]
) -> Probs:
    """The first group speaks first; what it leaves over goes to the next."""
    probs: Probs = {}
    left = 1.0
    for kind, named in groups:
        mass = sum(weight for _, weight in named)
        probs |= {token: left * reliability[kind] * w / mass for token, w in named}
        left *= 1 - reliability[kind]
    return probs


def escape_learns(
    groups: Iterable[tuple[Any, list[tuple[int, float]]]],
    reliability: dict[Any, float],
    token: int,
    rate: float,
) -> None:
    """Up to the first group that names `token`."""
    for kind, named in groups:
        hit = token in dict(named)
        reliability[kind] += rate * (hit - reliability[kind])
        if hit:
            return


class Trie:
    """`native/drafting/trie.hpp`: branches as tuples."""

    def __init__(self, depth: int, k: int, capacity: int, here: float, rate: float) -> None:
        self.depth, self.k, self.here, self.rate = depth, k, here, rate
        self.capacity = max(capacity, 4 * depth)
        self.counts: dict[Context, float] = {}
        self.reliability = {
            (n, b): 1 - 0.7 / 2 ** (n - 1) for n in range(1, depth) for b in range(4)
        }
        self.begin()

    def begin(self) -> None:
        self.text: Context = ()
        self.seen: dict[Context, float] = {}

    def weight(self, branch: Context) -> float:
        return self.counts[branch] + self.here * self.seen.get(branch, 0.0)

    def groups(self, text: Context) -> list[tuple[Any, list[tuple[int, float]]]]:
        named: set[int] = set()
        found = []
        for n in range(min(self.depth - 1, len(text)), 0, -1):
            context = text[-n:]
            below = {b[-1]: self.weight(b) for b in self.counts if b[:-1] == context}
            new = sorted(
                ((t, w) for t, w in below.items() if t not in named),
                key=lambda item: (-item[1], item[0]),
            )[: self.k]
            if new:
                sightings = sum(below.values())
                bucket = sum(sightings >= limit for limit in (1.5, 3.5, 9.5))
                found.append(((n, bucket), new))
                named |= {token for token, _ in new}
        return found

    def read(self, token: int, learn: bool) -> None:
        if learn:
            escape_learns(self.groups(self.text), self.reliability, token, self.rate)
        if len(self.counts) + 1 + self.depth > self.capacity:
            self.squeeze()
        contexts = [
            self.text[len(self.text) - d :] for d in range(min(self.depth, len(self.text) + 1))
        ]
        for context in [c for c in contexts if not c or c in self.counts]:
            branch = (*context, token)
            self.counts[branch] = self.counts.get(branch, 0.0) + 1
            self.seen[branch] = self.seen.get(branch, 0.0) + 1
        self.text = (*self.text, token)

    def squeeze(self) -> None:
        spare = True
        while spare or len(self.counts) + 1 > self.capacity - self.capacity // 4:
            kept: dict[Context, float] = {}
            for branch in sorted(self.counts, key=len):
                count = self.counts[branch]
                above = len(branch) == 1 or branch[:-1] in kept
                if above and (count > 1 or (spare and branch in self.seen)):
                    kept[branch] = count / 2 if count > 1 else count
            self.counts = kept
            self.seen = {b: n for b, n in self.seen.items() if b in kept}
            spare = False

    def propose(self, text: Context, budget: int) -> list[tuple[int, int, float]]:
        return grow(text, budget, lambda t: escaped(self.groups(t), self.reliability))


class Unclear(Exception):  # noqa: N818 (no error: the case is left out)
    """Two choices are so near each other that rounding decides."""


class Trigram:
    """`native/drafting/trigram.hpp`."""

    def __init__(self, k: int, explore: float, depth: int, keep: float, rate: float) -> None:
        self.k, self.explore, self.depth, self.keep, self.rate = k, explore, depth, keep, rate
        self.rows: dict[Context, Row] = {}
        self.reliability = {(r, i): (i + 0.5) / 10 for r in range(4) for i in range(10)}

    def cells(self, text: Context) -> list[tuple[int, float, tuple[int, int]]]:
        row = self.rows.get(text[-2:], Row()) if len(text) > 1 else Row()
        return [
            (token, p, (min(rank, 3), min(int(np.float32(p) * np.float32(10)), 9)))
            for rank, (token, p) in enumerate(row.probs.items())
        ]

    def observe(self, step: Step, learn: bool) -> None:
        texts = [tuple(step.context.tolist())]
        for token, parent in zip(step.tree.tokens[1:], step.tree.parents[1:], strict=True):
            texts.append((*texts[parent], int(token)))
        for node, drawn in zip(step.path.tolist(), step.drawn.tolist(), strict=True):
            for token, _, cell in self.cells(texts[node]) if learn else ():
                self.reliability[cell] += self.rate * ((token == drawn) - self.reliability[cell])
        for node, text in enumerate(texts):
            if len(text) > 1:
                seen = zip(
                    step.top_tokens[node].tolist(), step.top_probs[node].tolist(), strict=True
                )
                self.rows.setdefault(text[-2:], Row()).observe(seen, self.k, self.keep)

    def propose(self, context: Context, budget: int) -> list[tuple[int, int, float]]:
        nodes, texts = [(context[-1], -1, 1.0)], [context]

        def children(text: Context) -> list[dict[str, Any]]:
            return [
                {"token": t, "p": float(p), "cell": c, "node": None, "visits": 0, "value": 0.0}
                for t, p, c in self.cells(text)
            ]

        below = [children(context)]
        for _ in range(4 * budget):
            if len(nodes) > budget or not below[0]:
                break
            branch: list[dict[str, Any]] = []
            node: int | None = 0
            while node is not None and len(branch) < self.depth and below[node]:
                chosen = self.choose(below[node])
                branch.append(chosen)
                parent, node = node, chosen["node"]
                if node is None:
                    chosen["node"] = len(nodes)
                    nodes.append((chosen["token"], parent, self.reliability[chosen["cell"]]))
                    texts.append((*texts[parent], chosen["token"]))
                    below.append(children(texts[-1]))
            value = 0.0
            for child in reversed(branch):
                value = child["p"] * (1 + value)
                child["visits"] += 1
                child["value"] += (value / 4 - child["value"]) / child["visits"]
        sums = [sum(s for _, p, s in nodes if p == at) for at in range(len(nodes))]
        return [nodes[0], *((t, p, s / max(1.0, sums[p])) for t, p, s in nodes[1:])]

    def choose(self, among: list[dict[str, Any]]) -> dict[str, Any]:
        visits = 1 + sum(child["visits"] for child in among)
        weight = (self.explore + math.log((visits + 19653) / 19652)) * math.sqrt(visits)
        worth = [c["value"] + weight * c["p"] / (1 + c["visits"]) for c in among]
        order = sorted(range(len(among)), key=lambda i: -worth[i])
        if len(order) > 1 and 0 < worth[order[0]] - worth[order[1]] < 1e-5:
            raise Unclear
        return among[order[0]]


class Suffixes:
    """`native/drafting/suffix_array.hpp`: every occurrence is looked for."""

    def __init__(self, corpus: Context, longest: int, k: int, samples: int, rate: float) -> None:
        self.corpus, self.longest, self.k = corpus, longest, k
        self.samples, self.rate = samples, rate
        self.order = sorted(range(len(corpus)), key=lambda at: corpus[at:])
        self.reliability = {
            (n, b): 1 - 0.85 * 0.75 ** (n - 1) for n in range(1, longest + 1) for b in range(4)
        }

    def places(self, pattern: Context) -> list[int]:
        n = len(pattern)
        return [at for at in self.order if self.corpus[at : at + n] == pattern]

    def patterns(self, text: Context) -> list[Context]:
        """The longest match and up to two shorter ones that occur more often."""
        found: list[Context] = []
        for n in range(min(self.longest, len(text)), 0, -1):
            times = len(self.places(text[-n:]))
            if times > (len(self.places(found[-1])) if found else 0):
                found.append(text[-n:])
        return found[:3]

    def groups(self, patterns: list[Context]) -> list[tuple[Any, list[tuple[int, float]]]]:
        named: set[int] = set()
        found = []
        for pattern in patterns:
            places = self.places(pattern)
            looks = min(self.samples, len(places))
            counts: dict[int, float] = {}
            for i in range(looks):
                at = places[(2 * i + 1) * len(places) // (2 * looks)] + len(pattern)
                if at < len(self.corpus) and self.corpus[at] >= 0 and self.corpus[at] not in named:
                    counts[self.corpus[at]] = counts.get(self.corpus[at], 0) + 1
            new = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: self.k]
            if new:
                bucket = sum(len(places) > limit for limit in (1, 3, 15))
                found.append(((min(len(pattern), self.longest), bucket), new))
                named |= {token for token, _ in new}
        return found

    def learn(self, text: Context, prompt: int) -> None:
        for at in range(prompt, len(text)):
            groups = self.groups(self.patterns(text[:at]))
            escape_learns(groups, self.reliability, text[at], self.rate)

    def propose(self, text: Context, budget: int) -> list[tuple[int, int, float]]:
        first = self.patterns(text)

        def successors(branch: Context) -> Probs:
            grown = [(*pattern, *branch[len(text) :]) for pattern in first]
            return escaped(self.groups([g for g in grown if self.places(g)]), self.reliability)

        return grow(text, budget, successors)
