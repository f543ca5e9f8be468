"""The plots of a bench's document; `docs/reference/bench-json.md` says what its fields mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from paceline.measuring.report.document import Document
from paceline.measuring.report.svg import Axis, Plot, doubling, even

PARTS = (("draft", "drafting"), ("guide", "guides"), ("forward", "pass"), ("walk", "walk"))


class Colours:
    """A CSS class for every drafter and origin; one name always has the same colour."""

    COUNT = 10

    def __init__(self, document: Document) -> None:
        arms = document["arms"]
        names = [arm["drafter"] for arm in arms[1:]]
        names += [row["origin"] for arm in arms for row in arm["reliability"]]
        self.names = list(dict.fromkeys(names))

    def __getitem__(self, name: str) -> str:
        """Return the class of a name; grey if it never drafted."""
        return f"c{self.names.index(name) % self.COUNT}" if name in self.names else "own"

    def of(self, arm: Document) -> str:
        """Return the class of an arm; hollow marks stand for drafters that are reset."""
        return self[arm["drafter"]] + (" hollow" if arm["state"] == "reset" else "")


def chosen(document: Document) -> list[Document]:
    """Return one arm per drafter and state: with budget auto, or else the fastest in total."""
    return [
        max(arms, key=lambda arm: (arm["budget"] == "auto", arm["total"]["ratio"]["value"]))
        for arms in _kinds(document)
    ]


def eager(document: Document) -> list[Document]:
    """Return one arm per drafter and state: the one whose passes had the most nodes."""
    return [max(arms, key=lambda arm: float(arm["nodes_per_pass"])) for arms in _kinds(document)]


def _kinds(document: Document) -> Iterable[list[Document]]:
    kinds: dict[tuple[str, str], list[Document]] = {}
    for arm in document["arms"][1:]:
        kinds.setdefault((arm["drafter"], arm["state"]), []).append(arm)
    return kinds.values()


def speed(document: Document, arms: Sequence[Document], colours: Colours) -> str:
    """Plot the speed relative to plain decoding with intervals, for all prompts and per task."""
    rows = [("all", arms)]
    if len(arms[0]["categories"]) > 1:
        for name in arms[0]["categories"]:
            rows.append((name, [{**arm, **arm["categories"][name]} for arm in arms]))
    ratios = [arm["total"]["ratio"] for _, group in rows for arm in group]
    ends = [ratio[end] for ratio in ratios for end in ("low", "high")]
    x = even("times plain decoding's speed", [*ends, 1.0], 8)
    band = max(24, 13 * len(arms) + 11)
    left = _room(name for name, _ in rows)
    plot = Plot(x, None, band * len(rows) + 46, left)
    plot.line([(1.0, 0.0), (1.0, 1.0)], "even")
    for place, (name, group) in enumerate(rows):
        if place:
            plot.line([(end, 1 - place / len(rows)) for end in (x.ticks[0], x.ticks[-1])], "grid")
        plot.row(1 - (place + 0.5) / len(rows), name)
        for lane, arm in enumerate(group):
            y = 1 - (place + (lane + 1) / (len(group) + 1)) / len(rows)
            ratio = arm["total"]["ratio"]
            tip = (
                f"{arm['name']}, {name}: {ratio['value']:.2f}× "
                f"({ratio['low']:.2f} to {ratio['high']:.2f}), {arm['prompts']} prompts"
            )
            css = colours.of(arm)
            plot.line([(ratio["low"], y), (ratio["high"], y)], css)
            plot.dot(ratio["value"], y, css, tip)
    return plot.svg("Speed against plain decoding by task, with 95 % intervals")


def _room(names: Iterable[str]) -> int:
    """Return the units that names to the left of the axes take."""
    return min(180, 20 + round(8.2 * max(map(len, names))))


def budgets(document: Document, colours: Colours) -> str:
    """Plot tokens per pass against the budget."""
    arms = document["arms"][1:]
    fixed = [arm for arm in arms if arm["budget"] != "auto"]
    sizes = [arm["budget"] for arm in fixed] + [arm["nodes_per_pass"] - 1 for arm in arms]
    x = doubling("budget: nodes beyond the root", 1, max(2, *sizes))
    y = even("tokens per pass", [1.0, *(arm["tokens_per_pass"] for arm in arms)])
    plot = Plot(x, y)
    for kind in dict.fromkeys((arm["drafter"], arm["state"]) for arm in fixed):
        same = [arm for arm in fixed if (arm["drafter"], arm["state"]) == kind]
        same.sort(key=lambda arm: arm["budget"])
        points = [(arm["budget"], arm["tokens_per_pass"]) for arm in same]
        plot.line(points, colours.of(same[0]))
    for arm in arms:
        auto = arm["budget"] == "auto"
        tip = (
            f"{arm['name']}: {arm['tokens_per_pass']:.2f} tokens for "
            f"{arm['nodes_per_pass']:.1f} nodes per pass"
        )
        place = arm["nodes_per_pass"] - 1 if auto else arm["budget"]
        plot.dot(place, arm["tokens_per_pass"], colours.of(arm), tip, 6 if auto else 4)
    return plot.svg("Tokens per pass against budget")


def operating(document: Document, arms: Sequence[Document], colours: Colours) -> str:
    """Plot T(n), and what the passes of each arm cost and gained, in plain passes."""
    cost, base = document["cost"], document["arms"][0]["pass_seconds"]["decode"]
    spent = [arm["pass_seconds"]["decode"] / base for arm in arms]
    used = max(2.0, *(arm["nodes_per_pass"] for arm in arms))
    x = doubling("nodes of a pass", 1, 2 ** math.ceil(math.log2(used) + 1e-9))
    curve = [
        (n, times)
        for n, times in zip(cost["nodes"], cost["relative"], strict=True)
        if n <= x.ticks[-1]
    ]
    heights = [times for _, times in curve] + spent + [arm["tokens_per_pass"] for arm in arms]
    plot = Plot(x, doubling("plain passes", min(heights), max(heights)))
    plot.line(curve, "cost")
    plot.text(*curve[-1], "T(n)/T(1)", (-4, -10), "end")
    for arm, price in zip(arms, spent, strict=True):
        css, nodes, gain = colours.of(arm), arm["nodes_per_pass"], arm["tokens_per_pass"]
        for size, count in (arm["governor"] or {"sizes": {}})["sizes"].items():
            share = count / arm["governor"]["passes"]
            height = _interpolated(curve, int(size))
            tip = f"{arm['name']}: {share:.0%} of passes had {size} nodes"
            plot.dot(int(size), height, f"{css} size", tip, 1.5 + 6 * math.sqrt(share))
        plot.line([(nodes, price), (nodes, gain)], css if gain > price else f"{css} loss")
        tip = f"{arm['name']}: a pass of {nodes:.1f} nodes "
        plot.dot(
            nodes,
            price,
            f"{colours[arm['drafter']]} price",
            f"{tip}costs {price:.2f} plain passes",
            3.5,
        )
        plot.dot(nodes, gain, css, f"{tip}gains {gain:.2f} tokens")
    return plot.svg("T(n) with the operating points of the arms")


def _interpolated(curve: Sequence[tuple[float, float]], n: float) -> float:
    for (a, low), (b, high) in pairwise(curve):
        if n <= b:
            return low + (high - low) * max(n - a, 0) / (b - a)
    return curve[-1][1]


def passes(document: Document, arms: Sequence[Document]) -> str:
    """Plot where the time of a mean pass goes."""
    rows = [document["arms"][0], *arms]
    most = max(arm["pass_seconds"]["decode"] for arm in rows)
    unit, name = (1e3, "milliseconds") if most > 2e-3 else (1e6, "microseconds")
    x = even(f"{name} a pass", [0.0, 1.12 * unit * most])
    left = _room(arm["name"] for arm in rows)
    plot = Plot(x, None, 26 * len(rows) + 46, left)
    for place, arm in enumerate(rows):
        y, start = 1 - (place + 0.5) / len(rows), 0.0
        seconds = arm["pass_seconds"]
        plot.row(y, arm["name"])
        rest = seconds["decode"] - sum(seconds[part] for part, _ in PARTS)
        named = [(part, label, seconds[part]) for part, label in PARTS]
        for part, label, time in [*named, ("rest", "the loop around them", max(rest, 0.0))]:
            tip = f"{arm['name']}, {label}: {unit * time:.3g} {name} a pass"
            plot.bar(start, start + unit * time, y, 14, part, tip)
            start += unit * time
        plot.text(start, y, f"÷ {arm['tokens_per_pass']:.2f}", (5, 4))
    return plot.svg("Time of a pass: drafting, guides, pass, walk")


def reliability(arm: Document, colours: Colours) -> str:
    """Plot predicted against observed probability, one line for each origin of an arm."""
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    plot = Plot(Axis("predicted probability", ticks), Axis("observed", ticks))
    plot.line([(0.0, 0.0), (1.0, 1.0)], "even")
    for row in arm["reliability"]:
        css = colours[row["origin"]]
        plot.line([(b["predicted"], b["observed"]) for b in row["buckets"]], css)
        for bucket in row["buckets"]:
            tip = (
                f"{row['origin']}, {bucket['tested']} nodes: predicted {bucket['predicted']:.2f}, "
                f"observed {bucket['observed']:.2f}"
            )
            share = bucket["tested"] / row["tested"]
            plot.dot(bucket["predicted"], bucket["observed"], css, tip, 2 + 7 * math.sqrt(share))
    return plot.svg(f"Reliability of the scores of {arm['name']}")
