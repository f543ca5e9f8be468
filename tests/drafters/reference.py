"""What `recycle` and `lookup` mean, in plain Python: no bounds, no hashing, no speed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.core import Step

Context = tuple[int, ...]
Chances = dict[int, Any]
FLOOR, LARGEST, MOST = 0.002, 8.0, 32


@dataclass
class Row:
    """A context's likeliest successors, best first."""

    count: int = 0
    probs: Chances = field(default_factory=dict)

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
    context: Context, budget: int, successors: Callable[[Context], Chances]
) -> list[tuple[int, int, float]]:
    """Nodes (token, parent, chance) of the tree of the likeliest paths."""
    nodes, paths, texts = [(context[-1], -1, 1.0)], [1.0], [context]
    open_: list[tuple[float, int, int, float]] = []
    while len(nodes) <= budget:
        node = len(nodes) - 1
        for token, chance in successors(texts[node]).items():
            heapq.heappush(open_, (-paths[node] * chance, node, token, chance))
        if not open_:
            break
        path, parent, token, chance = heapq.heappop(open_)
        nodes.append((token, parent, chance))
        paths.append(-path)
        texts.append((*texts[parent], token))
    return nodes


class Mixer:
    """`native/mixer.hpp`."""

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

    def chances(self, text: Context) -> tuple[Chances, float]:
        """Of each candidate, and of another token."""
        lead, rows = self.evidence(text)
        scores: Chances = {}
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
        chances, other = self.chances(text)

        def moved(value: float, gradient: float) -> float:
            step = self.rate / max(len(rows), 1) * gradient
            return max(-LARGEST, min(LARGEST, value + step))

        missed = drawn not in chances
        for at, row in rows:
            rest = max(1 - sum(row.probs.values()), 0.0)
            gradient = (missed - other) * math.log1p(rest / FLOOR)
            first = 0.0
            for i, (token, p) in enumerate(row.probs.items()):
                if token in chances:
                    error = (token == drawn) - chances[token]
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
        return grow(context, budget, lambda text: self.chances(text)[0])


class Lookup:
    """`native/lookup.hpp`, the index made anew for every guess."""

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

    def by_length(self, rows: dict[Context, Row], text: Context) -> list[tuple[int, Chances]]:
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

    def chances(self, rows: dict[Context, Row], text: Context) -> Chances:
        chances: Chances = {}
        left = 1.0
        for n, new in self.by_length(rows, text):
            share = left * self.reliability[n - 1]
            chances |= {token: share * p / sum(new.values()) for token, p in new.items()}
            left *= 1 - self.reliability[n - 1]
        return chances

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
        return grow(text, budget, lambda context: self.chances(rows, context))


class Suffix:
    """`native/suffix.hpp` while nothing has aged: every string is searched in all texts."""

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

    def voices(self, context: Context) -> list[tuple[int, Chances]]:
        """The matches of falling length, as kind and shares."""
        named: set[int] = set()
        found: list[tuple[int, Chances]] = []
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

    def chances(self, context: Context) -> Chances:
        chances: Chances = {}
        left = 1.0
        for kind, shares in self.voices(context):
            reliable = self.reliability[kind]
            chances |= {token: share * left * reliable for token, share in shares.items()}
            left *= 1 - reliable
        return chances

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
        return grow(text, budget, self.chances)
