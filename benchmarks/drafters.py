"""Tokens per pass of each drafter at each budget, as Markdown tables.

    python benchmarks/drafters.py ../shared/models/bitstories-3M

    python benchmarks/drafters.py ../shared/models/bitstories-3M --tasks 3

Greedy decoding, or sampling with `--temperature T` (each prompt with a seed of its own), on the
documents of stories-val, or with `--tasks N` on the first N questions of
each task of Spec-Bench: a prompt is the first 64 tokens of a document that
has as many, without its end marks; the output is always 100 new tokens, past the model's own end if
need be (`--stop` ends there). Cells: the drafter's state carried from prompt to prompt / reset at
every prompt. `recycle` and `blend` start from what `paceline warm` kept of the model, unless
`warm=false`; without it, those rows are alike. Speed is not measured: tokens per pass are the same
on any machine.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

from paceline import LM
from paceline.measuring.prompts import read_prompts

SHARED = Path(__file__).resolve().parents[2] / "shared"
QUESTIONS = SHARED / "data" / "spec-bench" / "question.jsonl"
STORIES = SHARED / "data" / "stories-val" / "soda-tinystories-instruct_val.txt.gz"
DRAFTERS = (
    "lookup",
    "suffix",
    "lookahead_trie",
    "trigram",
    "lookahead",
    "token_recycling",
    "recycle:warm=false",
    "recycle",
    "blend:warm=false",
    "blend",
)
BASE = "token_recycling"
BUDGETS = (4, 8, 16, 32, 80)
PROMPT, NEW = 64, 100

Prompts = list[list[int]]
Cell = tuple[float, ...]


def prompts(lm: LM, documents: slice) -> Prompts:
    """Return the first tokens of some of the documents that are long enough."""
    text = gzip.decompress(STORIES.read_bytes()).decode()
    stories = [story.replace("<|endoftext|>", "").strip() for story in text.split("\n\n")]
    tokens = (list(lm.tokenizer.encode(story)) for story in stories if story)
    return [ids[:PROMPT] for ids in tokens if len(ids) >= PROMPT][documents]


def questions(lm: LM, each: int) -> tuple[list[str], list[list[int]]]:
    """Tasks and prompts: the first turns of some questions, clipped to what leaves room."""
    room = min(lm.engine.config.context - NEW, 256)
    tasks: list[str] = []
    asked: list[list[int]] = []
    for dialogue in read_prompts(QUESTIONS):
        if tasks.count(dialogue.category) < each:
            tasks.append(dialogue.category)
            asked.append(list(lm.tokenizer.encode(dialogue.turns[0]))[-room:])
    return tasks, asked


def tokens_per_pass(
    lm: LM, chosen: Prompts, carried: bool, stop: bool, temperature: float
) -> float:
    """Over all prompts: new tokens divided by passes."""
    lm.reset()
    tokens = passes = 0
    for seed, prompt in enumerate(chosen):
        if not carried:
            lm.reset()
        request = lm.request(
            prompt,
            max_new_tokens=NEW,
            temperature=temperature,
            seed=seed,
            controls={},
            ignore_eos=not stop,
        )
        output = lm.stream(request).run()
        tokens += len(output.tokens)
        passes += output.passes
    return tokens / passes


def table(model: Path, documents: slice, options: argparse.Namespace) -> str:
    """One model on some documents, or on questions."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in options.drafters}
    count = 0
    for name in options.drafters:
        for budget in options.budgets:
            lm = LM(model, drafter=name, budget=budget, threads=1)
            asks = options.tasks
            chosen = questions(lm, asks)[1] if asks else prompts(lm, documents)
            count = len(chosen)
            how = options.stop, options.temperature
            carried, fresh = (tokens_per_pass(lm, chosen, c, *how) for c in (True, False))
            rows[name].append((carried, fresh))
    head = ["drafter", *(f"{budget} nodes" for budget in options.budgets)]
    where = f"prompts {documents.start}..{documents.start + count - 1}"
    if options.tasks:
        where = f"{count} questions of Spec-Bench"
    lines = [f"**{model.name}, {where}** (state carried / reset)", ""]
    lines += [_row(head), _row(["---"] * len(head))]
    lines += [_row([f"`{name}`", *(f"{a:.2f} / {b:.2f}" for a, b in rows[name])]) for name in rows]
    single = [cells for name, cells in rows.items() if not name.startswith("blend")]
    for name in (name for name in rows if name.startswith("blend")):
        best = [tuple(map(max, zip(*cells, strict=True))) for cells in zip(*single, strict=True)]
        lines.append(_ratios(f"`{name}` over the best of the others", rows[name], best))
        if BASE in rows:
            lines.append(_ratios(f"`{name}` over `{BASE}`", rows[name], rows[BASE]))
    return "\n".join(lines)


def _ratios(title: str, cells: Sequence[Cell], base: Sequence[Cell]) -> str:
    pairs = zip(cells, base, strict=True)
    return _row([title, *(f"{a / c:.2f}x / {b / d:.2f}x" for (a, b), (c, d) in pairs)])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _documents(text: str) -> slice:
    start, _, stop = text.partition(":")
    return slice(int(start), int(stop))


def main() -> None:
    """Parse the command line, print one table for each model and set of documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--documents", nargs="+", type=_documents, default=[slice(0, 40)])
    parser.add_argument("--tasks", type=int, metavar="N", help="questions of each Spec-Bench task")
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--stop", action="store_true", help="honour the model's stop tokens")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    options = parser.parse_args()
    for model in options.models:
        for documents in options.documents:
            print(table(model, documents, options), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
