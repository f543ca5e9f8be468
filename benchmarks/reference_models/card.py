"""Write a model's card from training.json, log.jsonl and results.json beside its weights."""

import json
from pathlib import Path
from textwrap import indent
from typing import Any

from benchmarks.reference_models.pack import table
from paceline.measuring.report.svg import Plot, even

STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #5f6670 }
.grid { stroke: #ecedea } .line { fill: none; stroke: var(--c); stroke-width: 2 }
.c0 { --c: #1769c9 } .c1 { --c: #d2520b } .c2 { --c: #2b8a3e } .c3 { --c: #8e3bb5 }
.c4 { --c: #c2255c } .c5 { --c: #0b7f93 } .c6 { --c: #937000 }"""

CARD = """\
---
language: en
pipeline_tag: text-generation
---
# {name}

A Llama of {parameters:,} parameters that Paceline's benchmarks run on. It is a subject for
measurements, small and trained for minutes: do not believe what it says.

| | |
|---|---|
| shape | {num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads over \
{num_key_value_heads} key/value heads of {head_dim}, inner width {intermediate_size}, context \
{max_position_embeddings} |
| vocabulary | {vocab_size:,} byte-level BPE pieces; the chat template is in chat_template.jinja |
| weights | bfloat16, embeddings tied |
| trained on | {tokens:,} tokens, {passes:.1f} passes over {unique:,}, in {minutes:.1f} minutes \
on {device} |

## Data

{data}

Held out are whole documents, by their hash. Documents that share 13 words in a row with an
evaluation set are in neither part; `excluded.json` beside the training code lists them. What the
texts are and their licences: Wikipedia CC BY-SA, 201 books in the public domain, Python's
enhancement proposals in the public domain and its standard library PSF-2.0, the Rust book MIT,
GSM8K MIT, MBPP CC BY 4.0.

## Training

![training loss](loss.svg)
![held-out bits per byte](validation.svg)

While training, held-out bits per byte are those of at most {shown} windows of each source.

## Results

Measured by `{command}`
on {processor}, weights in {format}, at commit {commit}.

{results}

### BLiMP by phenomenon

{phenomena}

## Samples

{samples}
"""


def plot(title: str, label: str, lines: dict[str, list[tuple[float, float]]], top: float) -> str:
    """Return an SVG file with a line for each name; what is above `top` lies on the edge."""
    points = [point for line in lines.values() for point in line]
    x = even("million tokens", [0.0, *(point[0] for point in points)])
    drawn = Plot(x, even(label, [min(point[1], top) for point in points]))
    for place, (name, line) in enumerate(lines.items()):
        css = f"c{place % 7}"
        drawn.line(line, css)
        if len(lines) > 1:
            across, down = 0.45, 0.97 - 0.06 * place
            at = (x.ticks[0] + across * (x.ticks[-1] - x.ticks[0]), _up(drawn, down))
            drawn.line([at, (at[0] + 0.05 * (x.ticks[-1] - x.ticks[0]), at[1])], css)
            drawn.text(at[0] + 0.06 * (x.ticks[-1] - x.ticks[0]), at[1], name, (0, 4))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="660"><style>{STYLE}</style>'
    body = drawn.svg(title)
    size = body[body.index("viewBox") : body.index(">")]
    return f"{head.replace(' width', f' {size} width')}{body[body.index('>') + 1 :]}\n"


def _up(drawn: Plot, share: float) -> float:
    assert drawn.y is not None
    return drawn.y.ticks[0] + share * (drawn.y.ticks[-1] - drawn.y.ticks[0])


def plots(log: list[dict[str, Any]]) -> dict[str, str]:
    """Return file name -> SVG."""
    train = [(row["tokens"] / 1e6, row["train"]) for row in log if "train" in row]
    held: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for name, bits in row.get("validation", {}).items():
            held.setdefault(name, []).append((row["tokens"] / 1e6, bits))
    found = {"loss.svg": plot("Training loss", "nats per token", {"train": train}, 6.0)}
    if held:
        found["validation.svg"] = plot("Held out", "bits per byte", held, 4.0)
    return found


def write_card(folder: Path) -> None:
    """Write README.md, loss.svg and validation.svg to a model's folder."""
    shape = json.loads((folder / "config.json").read_text())
    run = json.loads((folder / "training.json").read_text())
    results = json.loads((folder / "results.json").read_text("utf-8"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name, drawing in plots(log).items():
        (folder / name).write_text(drawing, "utf-8")
    unique = sum(parts["train"]["tokens"] for parts in run["data"].values())
    text = CARD.format(
        **shape | {key: run[key] for key in ("name", "parameters", "tokens", "minutes", "device")},
        passes=run["tokens"] / unique,
        unique=unique,
        data=table(run["data"]),
        shown=run["validation_windows"],
        command=results["command"],
        processor=results["machine"]["processor"],
        format=results["format"],
        commit=results["commit"],
        results=results_table(results),
        phenomena=rows(("phenomenon", "accuracy"), results["blimp"]["phenomena"].items()),
        samples="\n\n".join(map(sample, results["samples"])),
    )
    (folder / "README.md").write_text(text, "utf-8")


def rows(head: tuple[str, ...], body: Any) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def results_table(results: dict[str, Any]) -> str:
    """Return bits per byte, BLiMP and LAMBADA as Markdown."""
    body = [
        (f"{name}, bits per byte", found["bits_per_byte"], f"{found['bytes'] / 1e3:.0f} kB")
        for name, found in results["held_out"].items()
    ]
    for name, key in (("BLiMP, accuracy", "blimp"), ("LAMBADA, last word", "lambada")):
        found = results[key]
        low, high = (f"{100 * end:.1f}" for end in found["interval"])
        value = f"{100 * found['accuracy']:.1f} % ({low} to {high})"
        body.append((name, value, f"{found['items']:,} items"))
    return rows(("", "", "of"), body)


def sample(said: dict[str, Any]) -> str:
    """Return one sample as Markdown."""
    how = "greedy" if not said["temperature"] else f"temperature {said['temperature']}, seed 0"
    begin = f"Asked: {said['prompt']}\n\n" if said["chat"] else said["prompt"]
    quoted = indent(begin + said["text"], "    ", lambda line: True)  # nothing in it can end it
    return f"{'Answer' if said['chat'] else 'Text'}, {how}:\n\n{quoted}"
