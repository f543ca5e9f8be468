"""Small vector plots. Colours are CSS classes of the page, so they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


def clean(text: object) -> str:
    """Escape text for HTML; control characters are replaced by their Unicode pictures."""
    shown = str(text).encode("utf-8", "replace").decode()
    return "".join(
        chr(0x2400 + ord(char)) if char < " " and char not in "\t\n" else char
        for char in escape(shown)
    )


@dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        label: with its unit.
        ticks: increasing; the first and the last are the ends of the axis.
        log: logarithmic.
        show: formats a tick.
    """

    label: str
    ticks: tuple[float, ...]
    log: bool = False
    show: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """Return where `value` lies, 0 to 1 from end to end; values outside are clipped."""
        low, high = self.ticks[0], self.ticks[-1]
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def even(label: str, values: Iterable[float], most: int = 6) -> Axis:
    """Return a linear axis over round numbers that hold all `values`, in at most `most` steps."""
    low, high = (f(values) for f in (min, max)) if (values := [*values]) else (0.0, 1.0)
    span = high - low or abs(high) or 1.0
    scale = 10.0 ** math.floor(math.log10(span / most))
    step = next(
        scale * k for k in (1, 2, 2.5, 5, 10, 20) if _steps(low, high, scale * k)[1] <= most
    )
    first, count = _steps(low, high, step)
    return Axis(label, tuple(round((first + i) * step, 12) for i in range(count + 1)))


def _steps(low: float, high: float, step: float) -> tuple[int, int]:
    first = math.floor(low / step + 1e-9)
    return first, max(math.ceil(high / step - 1e-9) - first, 1)


def doubling(label: str, low: float, high: float) -> Axis:
    """Return a logarithmic axis over the powers of 2 around `low` and `high`, both above 0."""
    first = math.floor(math.log2(low) + 1e-9)
    last = max(math.ceil(math.log2(high) - 1e-9), first + 1)
    return Axis(label, tuple(2.0**power for power in range(first, last + 1)), log=True)


class Plot:
    """Marks over a pair of axes, in the order in which they are added.

    Args:
        x: from left to right.
        y: from bottom to top; None leaves that direction to the caller, 0 to 1.
        height: of the whole plot; a page gives it a width of 440 of the same units.
        left: space to the left of the axes.
    """

    WIDTH = 440

    def __init__(self, x: Axis, y: Axis | None, height: int = 290, left: int = 44) -> None:
        self.x, self.y, self.height, self.left = x, y, height, left
        self._top, self._right, self._bottom = 22 if y else 6, 14, 40
        self._parts: list[str] = []
        self._axes()

    def at(self, x: float, y: float) -> Point:
        """Return data coordinates as units of the drawing."""
        across = self.WIDTH - self.left - self._right
        down = self.height - self._top - self._bottom
        share = self.y.place(y) if self.y else y
        return self.left + across * self.x.place(x), self._top + down * (1 - share)

    def line(self, points: Sequence[Point], css: str) -> None:
        """Add a straight line from point to point."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self._parts.append(f'<polyline class="line {css}" points="{path}"/>')

    def dot(self, x: float, y: float, css: str, tip: str, radius: float = 4.5) -> None:
        """Add a mark; `tip` appears when it is pointed at."""
        a, b = self.at(x, y)
        self._parts.append(
            f'<circle class="dot {css}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:.1f}">'
            f"<title>{clean(tip)}</title></circle>"
        )

    def bar(self, start: float, end: float, y: float, thick: float, css: str, tip: str) -> None:
        """Add a horizontal bar, `thick` units high, centred at `y`."""
        (a, b), (c, _) = self.at(start, y), self.at(end, y)
        self._parts.append(
            f'<rect class="bar {css}" x="{a:.1f}" y="{b - thick / 2:.1f}" '
            f'width="{c - a:.1f}" height="{thick:.1f}"><title>{clean(tip)}</title></rect>'
        )

    def text(self, x: float, y: float, words: str, shift: Point, anchor: str = "start") -> None:
        """Add words `shift` units to the right of and below a point."""
        a, b = self.at(x, y)
        self._words(a + shift[0], b + shift[1], words, anchor)

    def row(self, y: float, words: str) -> None:
        """Add words to the left of the axes."""
        self._words(self.left - 8, self.at(self.x.ticks[0], y)[1] + 4, words, "end", "row")

    def svg(self, title: str) -> str:
        """Return the drawing; `title` is for readers that cannot see it."""
        return (
            f'<svg viewBox="0 0 {self.WIDTH} {self.height}" role="img" '
            f'aria-label="{clean(title)}">{"".join(self._parts)}</svg>'
        )

    def _words(self, x: float, y: float, words: str, anchor: str, css: str = "note") -> None:
        self._parts.append(
            f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{clean(words)}</text>"
        )

    def _axes(self) -> None:
        bottom = self.height - self._bottom
        for tick in self.x.ticks:
            x = self.at(tick, self.y.ticks[0] if self.y else 0)[0]
            self._parts.append(_rule(x, self._top, x, bottom))
            self._words(x, bottom + 15, self.x.show(tick), "middle", "tick")
        middle = (self.left + self.WIDTH - self._right) / 2
        self._words(middle, self.height - 6, self.x.label, "middle", "axis")
        if self.y:
            for tick in self.y.ticks:
                y = self.at(self.x.ticks[0], tick)[1]
                self._parts.append(_rule(self.left, y, self.WIDTH - self._right, y))
                self._words(self.left - 6, y + 4, self.y.show(tick), "end", "tick")
            self._words(4, 11, self.y.label, "start", "axis")


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
