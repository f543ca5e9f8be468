"""A bench's document as one HTML page: no script, nothing fetched, light or dark by preference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from paceline.measuring.report import plots
from paceline.measuring.report.document import Document
from paceline.measuring.report.frame import frame
from paceline.measuring.report.plots import Colours
from paceline.measuring.report.svg import clean

_PARTS = ("draft", "guide", "forward", "walk")
_MARKS, _BARS = 24, 12  # arms in one plot; of more, only the chosen ones


def page(document: Document) -> str:
    """Return the page of what `paceline bench --json` prints; every number is the document's."""
    arms, colours = plots.chosen(document), Colours(document)
    model = document["model"]["path"].rstrip("/").rpartition("/")[2]
    sections = [*_summary(document, arms, colours)]
    if arms:
        sections += [f'<div class="cards">{"".join(_cards(document, arms, colours))}</div>']
        sections += [*_traces(document, colours)]
    sections += [_table(document), _conditions(document)]
    return frame(f"Paceline bench: {model}", model, _facts(document), sections)


def number(value: float | None, form: str) -> str:
    """Return a number as it is shown, with its exact value in the markup."""
    if value is None:
        return "–"
    return f'<data value="{value!r}">{format(value, form)}</data>'


def _facts(document: Document) -> str:
    settings, engine = document["settings"], document["engine"]
    what = settings["suite"] or settings["file"].rpartition("/")[2]
    temperature = settings["temperature"]
    drawn = f"temperature {temperature:g}" if temperature else "greedy"
    threads = f", {engine['threads']} threads" if engine["threads"] else ""
    return (
        f"{settings['turns']} prompts of {what}, {settings['max_new_tokens']} new tokens each, "
        f"{drawn}, {settings['repeat']} rounds. {document['machine']['processor']}, "
        f"{engine['name']} engine, {engine['format']}{threads}. "
        f"Paceline {document['versions']['paceline']}, "
        f"commit {document['versions']['commit'] or '–'}."
    )


def _summary(document: Document, arms: list[Document], colours: Colours) -> Iterator[str]:
    """Yield whether outputs are equal, and a tile for each chosen arm."""
    compared = [arm for arm in document["arms"] if arm["walk"] == "gumbel"]
    outputs = sum(arm["runs"] for arm in compared)
    different = sum(arm["different"] for arm in compared)
    drawn = sum(arm["runs"] for arm in document["arms"]) - outputs
    text = f"{different} of {outputs} outputs differ from plain decoding."
    if not different:
        text = f"All {outputs:,} outputs are identical to plain decoding, token by token."
    if drawn:
        note = (
            f"{drawn:,} outputs come from the rejection walk: equal in distribution, not in text."
        )
        text = f"{text} {note}" if len(compared) > 1 else note  # plain equals itself
    yield f'<p class="verdict {"bad" if different else "good"}">{text}</p>'
    yield '<div class="tiles">'
    for arm in arms:
        ratio = arm["total"]["ratio"]
        yield (
            f'<section class="tile {colours.of(arm)}"><h2>{clean(arm["name"])}</h2>'
            f'<p class="big">{number(ratio["value"], ".2f")}<small>× plain</small></p>'
            f"<p>95 %: {number(ratio['low'], '.2f')} to {number(ratio['high'], '.2f')}</p>"
            f"<p>{number(arm['tokens_per_pass'], '.2f')} tokens, "
            f"{number(arm['nodes_per_pass'], '.1f')} nodes a pass</p>"
            f"<p>{number(arm['total']['tokens_per_second'], ',.0f')} tokens/s</p>"
        )
        if arm["governor"]:
            yield f'<p class="why">{clean(arm["governor"]["reason"])}</p>'
        yield "</section>"
    yield "</div>"
    if arms:
        yield (
            '<p class="aside">Shown for each drafter: budget auto, or else the budget that came '
            "out fastest. Speed is all tokens over all seconds of decoding, prefill apart. All "
            "arms are in the table below.</p>"
        )


def _cards(document: Document, arms: list[Document], colours: Colours) -> Iterator[str]:
    drafters = _legend(document, colours)
    caption = "A dot is all of a task's tokens over all its seconds, its line the 95 % interval."
    yield _card("Speed by task", caption, plots.speed(document, arms, colours), drafters)
    caption = "Every further node helps less. Large dots: mean size that budget auto chose."
    yield _card("Tokens per pass", caption, plots.budgets(document, colours), drafters)
    caption = (
        "The curve is the time of a pass over n nodes. For each arm a line leads from what its "
        "passes cost, drafting included (small), to the tokens they gained (large): the longer "
        "upwards, the faster. Rings on the curve: sizes that budget auto chose."
    )
    every = document["arms"][1:]
    shown = every if len(every) <= _MARKS else arms
    yield _card(
        "T(n) and where arms run", caption, plots.operating(document, shown, colours), drafters
    )
    keys = [*((part, text) for part, text in plots.PARTS), ("rest", "the loop")]
    legend = "".join(f'<span class="key {css}">{text}</span>' for css, text in keys)
    caption = "After ÷: tokens per pass. A pass may cost more if it yields more."
    shown = every if len(every) <= _BARS else arms
    yield _card("Where a pass's time goes", caption, plots.passes(document, shown), legend)
    for arm in plots.eager(document):
        if any(row["tested"] for row in arm["reliability"]):
            caption = "Scores on the diagonal are calibrated. Larger dots: more nodes."
            title = f"Reliability: {arm['name']}"
            yield _card(title, caption, plots.reliability(arm, colours), _reliability(arm, colours))


def _card(title: str, caption: str, drawing: str, legend: str) -> str:
    return (
        f'<section class="card"><h2>{clean(title)}</h2><p>{caption}</p>{drawing}'
        f'<div class="legend">{legend}</div></section>'
    )


def _legend(document: Document, colours: Colours) -> str:
    drafters = dict.fromkeys(arm["drafter"] for arm in document["arms"][1:])
    keys = [f'<span class="key {colours[name]}">{clean(name)}</span>' for name in drafters]
    if document["settings"]["state"] == "both":
        keys.append('<span class="key own">carried</span><span class="key own hollow">reset</span>')
    return "".join(keys)


def _reliability(arm: Document, colours: Colours) -> str:
    heads = ("origin", "nodes", "predicted", "observed", "Brier", "error")
    rows = [
        [
            f'<span class="key {colours[row["origin"]]}">{clean(row["origin"])}</span>',
            number(row["tested"], ","),
            *(number(row[name], ".3f") for name in ("predicted", "observed", "brier", "error")),
        ]
        for row in arm["reliability"]
    ]
    depths = [
        [
            clean(row["origin"]),
            number(depth["depth"], ""),
            number(depth["tested"], ","),
            number(depth["predicted"], ".3f"),
            number(depth["observed"], ".3f"),
        ]
        for row in arm["reliability"]
        for depth in row["depths"]
    ]
    more = _rows(("origin", "depth", "nodes", "predicted", "observed"), depths)
    depth = f"<details><summary>by depth</summary>{more}</details>"
    return f'<div class="scroll">{_rows(heads, rows)}{depth}</div>'


def _traces(document: Document, colours: Colours) -> Iterator[str]:
    prompt = document["trace"]["prompt"]
    yield (
        '<section class="wide"><h2>Where each token came from</h2>'
        f"<p>The answer to {clean(prompt)}, with each drafter's largest trees. "
        "A coloured token was drafted, the stronger the higher its score; "
        "a grey one is the model's own, which ends a pass. Point at a token, or tap it.</p>"
    )
    for place, arm in enumerate(plots.eager(document)):
        tokens = document["trace"]["arms"][arm["name"]]
        origins = dict.fromkeys(token["origin"] for token in tokens if token["origin"])
        keys = [f'<span class="key {colours[name]}">{clean(name)}</span>' for name in origins]
        total = tokens[-1]["number"] if tokens else 0
        yield (
            f"<details{'' if place else ' open'}><summary>{clean(arm['name'])}: {len(tokens)} "
            f'tokens in {total} passes</summary><div class="legend">{"".join(keys)}'
            f'<span class="key own">the model</span></div><p class="trace">'
            f"{''.join(_token(token, total, colours) for token in tokens)}</p></details>"
        )
    yield "</section>"


def _token(token: Document, passes: int, colours: Colours) -> str:
    where = f"pass {token['number']} of {passes}, {token['nodes']} nodes"
    css, tip, strength = "own", f"the model's own · {where}", ""
    if token["origin"] is not None:
        css = colours[token["origin"]]
        tip = f"{token['origin']} · score {token['score']:.2f} · depth {token['depth']} · {where}"
        strength = f' style="--sure:{14 + 46 * token["score"]:.0f}%"'
    text = clean(token["text"]).replace("\n", "↵\n") or "·"
    names = f'class="token {css}"{strength} tabindex="-1" data-tip="{clean(tip)}"'
    return f"<span {names}>{text}</span>"


def _table(document: Document) -> str:
    heads = ("arm", "× plain", "95 %", "+ prefill", "tokens/s", "tokens/pass", "nodes/pass")
    more = ("draft µs", "guides µs", "pass µs", "walk µs", "all µs", "learnt KB", "different")
    rows = []
    for arm in document["arms"]:
        ratio, seconds = arm["total"]["ratio"], arm["pass_seconds"]
        rows.append(
            [
                clean(arm["name"]),
                number(ratio["value"], ".3f"),
                f"{number(ratio['low'], '.2f')}–{number(ratio['high'], '.2f')}",
                number(arm["ratio_with_prefill"]["median"], ".2f"),
                number(arm["total"]["tokens_per_second"], ",.1f"),
                number(arm["tokens_per_pass"], ".3f"),
                number(arm["nodes_per_pass"], ".2f"),
                *(_scaled(seconds[part], 1e6) for part in (*_PARTS, "decode")),
                _scaled(arm["state_bytes"], 1e-3),
                number(arm["different"], "") if arm["walk"] == "gumbel" else "distr.",
            ]
        )
    return (
        '<section class="wide"><h2>All arms</h2><p>+ prefill: median over prompts. Times are those '
        f'of a mean pass.</p><div class="scroll">{_rows((*heads, *more), rows)}</div></section>'
    )


def _scaled(value: float, factor: float) -> str:
    return f'<data value="{value!r}">{value * factor:,.0f}</data>'


def _rows(heads: Iterable[str], rows: Iterable[list[str]]) -> str:
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _conditions(document: Document) -> str:
    names = ("settings", "model", "engine", "machine", "versions", "bandwidth", "memory", "cost")
    facts = {name: document[name] for name in (*names, "clipped", "left_out")}
    text = clean(json.dumps(facts, indent=2))
    shown = f"<details><summary>Conditions</summary><pre>{text}</pre></details>"
    return f'<section class="wide">{shown}</section>'
