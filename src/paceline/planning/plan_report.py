"""A plan as an HTML page: the table, the Pareto plot, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paceline.measuring.report.frame import frame
from paceline.measuring.report.html import number
from paceline.measuring.report.svg import Plot, clean, even
from paceline.planning.plan_document import notes, prediction_errors
from paceline.planning.plan_search import Candidate
from paceline.planning.planner import PlanResult

_MARKS = 400  # dots of a plot


def plan_page(result: PlanResult) -> str:
    """Return the page; it has no script and fetches nothing."""
    plan = result.plan
    machine = plan.machine.get("processor", "unknown processor")
    goal = ", ".join(f"{name} {value}" for name, value in plan.goal.document().items())
    facts = f"{goal}. {machine}. Paceline {plan.version}."
    sections = [*_said(result), _table(result), _cards(result), _left_out(result)]
    return report_page(plan.name, facts, sections)


def report_page(name: str, facts: str, sections: Sequence[str]) -> str:
    """Return a page about a model: its name, a line of facts, and sections of HTML."""
    return frame(f"Paceline plan: {name}", name, facts, sections)


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one equals in memory and loss and beats in speed.

    Those without a known loss are left out. They are sorted by memory.
    """
    known = [each for each in candidates if each.loss is not None]

    def beaten(each: Candidate) -> bool:
        return any(
            other.forecast.memory <= each.forecast.memory
            and _loss(other) <= _loss(each)
            and other.forecast.tokens_per_second > each.forecast.tokens_per_second
            for other in known
        )

    return sorted((e for e in known if not beaten(e)), key=lambda each: each.forecast.memory)


def _loss(candidate: Candidate) -> float:
    return 0.0 if candidate.exact or candidate.loss is None else candidate.loss.value


def _said(result: PlanResult) -> Iterator[str]:
    chosen = result.plan.chosen
    what = "exact" if chosen.exact else "lossy"
    yield f'<p class="verdict good">{clean(chosen.setup.title)} ({what})</p>'
    yield "".join(f'<p class="aside">{clean(line)}.</p>' for line in notes(result))


def _table(result: PlanResult) -> str:
    heads = (
        *("setup", "tokens/s", "low", "high", "predicted", "first token (s)", "memory (MB)"),
        *("loss", "±", "exact", "needs", "command"),
    )
    rows = []
    for row in result.plan.rows:
        cells = [
            clean(row.setup.title),
            *(number(each, ".1f") for each in (row.speed, row.low, row.high, row.predicted)),
            number(row.first_token, ".3f"),
            number(row.memory / 1e6, ",.1f"),
            number(row.loss, "+.4f"),
            number(row.loss_error, ".4f"),
            "yes" if row.exact else "no",
            clean(row.needs),
            f"<code>{clean(row.setup.command())}</code>",
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    named = "".join(f"<th>{head}</th>" for head in heads)
    return (
        '<section class="wide"><h2>Setups</h2><div class="scroll"><table>'
        f"<thead><tr>{named}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cards(result: PlanResult) -> str:
    cards = [card("Memory, speed and loss", _PARETO, _pareto_plot(result))]
    if result.verified:
        errors = prediction_errors(result)
        assert errors is not None
        caption = f"On the line a forecast is right. Median error: {errors['median']:.0%}."
        cards.append(card("Predicted and measured", caption, _error_plot(result)))
    return f'<div class="cards">{"".join(cards)}</div>'


_PARETO = (
    "Every dot is a setup by its forecast; the line joins those that nothing beats in memory, loss "
    "and speed. Blue: exact; orange: within the goal; grey: outside. Large: what was chosen."
)


def card(title: str, caption: str, drawing: str) -> str:
    """Return a drawing with its title and a caption."""
    return (
        f'<section class="card"><h2>{clean(title)}</h2><p>{clean(caption)}</p>{drawing}</section>'
    )


def _pareto_plot(result: PlanResult) -> str:
    shown = result.candidates[:_MARKS]
    sizes = [each.forecast.memory / 1e6 for each in shown]
    speeds = [each.forecast.tokens_per_second for each in shown]
    plot = Plot(even("memory (MB)", [0.0, *sizes]), even("tokens/s", [0.0, *speeds]))
    front = pareto(shown)
    if len(front) > 1:
        points = [(each.forecast.memory / 1e6, each.forecast.tokens_per_second) for each in front]
        plot.line(points, "cost")
    for each, size, speed in zip(shown, sizes, speeds, strict=True):
        css = "c0" if each.exact else "c1"
        if not each.fits(result.plan.goal):
            css = "own"
        loss = "exact" if each.exact else "loss unknown"
        if each.loss is not None and not each.exact:
            loss = f"loss {each.loss.value:.4f}"
        chosen = each.setup == result.plan.chosen.setup
        tip = f"{each.setup.title}: {speed:.1f} tokens/s, {size:.1f} MB, {loss}"
        plot.dot(size, speed, css, tip, 8 if chosen else 3.5)
    return plot.svg("Memory against speed of all setups")


def _error_plot(result: PlanResult) -> str:
    measured = [each.speed.value for each in result.verified]
    predicted = [each.candidate.forecast.tokens_per_second for each in result.verified]
    top = max(*measured, *predicted)
    plot = Plot(even("predicted tokens/s", [0.0, top]), even("measured", [0.0, top]))
    plot.line([(0.0, 0.0), (top, top)], "even")
    for each, own, said in zip(result.verified, measured, predicted, strict=True):
        plot.line([(said, each.speed.low), (said, each.speed.high)], "c0")
        tip = f"{each.candidate.setup.title}: predicted {said:.1f}, measured {own:.1f} tokens/s"
        plot.dot(said, own, "c0", tip)
    return plot.svg("Predicted against measured speed")


def _left_out(result: PlanResult) -> str:
    rows = "".join(
        f"<tr><td>{clean(name)}</td><td>{clean(reason)}</td></tr>"
        for name, reason in result.left_out.items()
    )
    if not rows:
        return ""
    return (
        '<section class="wide"><h2>Left out</h2><div class="scroll"><table><tbody>'
        f"{rows}</tbody></table></div></section>"
    )
