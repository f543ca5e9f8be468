"""Tokens per pass of each drafter at each budget, as Markdown tables.

    python benchmarks/drafters.py ../shared/models/bitstories-3M

    python benchmarks/drafters.py ../shared/models/bitstories-3M --tasks 3

    python benchmarks/drafters.py MODEL.gguf --chat --tasks 10 --drafters recycle blend

Greedy decoding, or sampling with `--temperature T` (each prompt with a seed of its own), on the
documents of stories-val, or with `--tasks N` on the first N questions of
each task of Spec-Bench: a prompt is the first 64 tokens of a document that
has as many, without its end marks; the output is always 100 new tokens, past the model's own end if
need be (`--stop` ends there). `--chat` asks the first N questions of each of the six tasks through
the chat template, the tasks in turn, for at most 128 new tokens up to the answer's end. Cells: the
drafter's state carried from prompt to prompt / reset at every prompt (`--state` takes one of them).
Ratios have 95 % intervals, resampled over prompts, as all drafters answer the same ones.
`recycle` and `blend` start from what `paceline warm` kept of the model, unless `warm=false`;
without it, those rows are alike. Speed is not measured: tokens per pass are the same on any
machine.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from paceline import LM
from paceline.measuring.prompts import read_prompts
from paceline.measuring.statistics import total_ratio

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
STATES = ("carried", "reset")


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


class Counts(NamedTuple):
    """New tokens and passes of each prompt."""

    tokens: list[int]
    passes: list[int]

    @property
    def rate(self) -> float:
        """Tokens per pass over all prompts."""
        return sum(self.tokens) / sum(self.passes)


def counts(lm: LM, chosen: Prompts, carried: bool, options: argparse.Namespace) -> Counts:
    """Answer all prompts."""
    lm.reset()
    found = Counts([], [])
    for seed, prompt in enumerate(chosen):
        if not carried:
            lm.reset()
        request = lm.request(
            prompt,
            max_new_tokens=options.new,
            temperature=options.temperature,
            seed=seed,
            controls={},
            ignore_eos=not (options.stop or options.chat),
        )
        output = lm.stream(request).run()
        found.tokens.append(len(output.tokens))
        found.passes.append(output.passes)
    return found


def in_turns(lm: LM, each: int, new: int) -> Prompts:
    """Return the first questions of each task as chats, one task after the other."""
    from asked import questions as chats  # it imports this module

    tasks, ids = chats(lm, each, True, new)
    seen: dict[str, int] = {}
    places = []
    for place, task in enumerate(tasks):
        seen[task] = seen.get(task, 0) + 1
        places.append((seen[task], place))
    return [ids[place] for _, place in sorted(places)]


def table(model: Path, documents: slice, options: argparse.Namespace) -> str:
    """One model on some documents, or on questions."""
    rows: dict[str, list[dict[str, Counts]]] = {name: [] for name in options.drafters}
    count = 0
    for name in options.drafters:
        for budget in options.budgets:
            lm = LM(model, drafter=name, budget=budget, threads=1, dtype=options.format)
            asks = options.tasks
            if options.chat:
                chosen = in_turns(lm, asks or 10, options.new)
            else:
                chosen = questions(lm, asks)[1] if asks else prompts(lm, documents)
            count = len(chosen)
            cell = {
                state: counts(lm, chosen, state == "carried", options)
                for state in STATES
                if state in options.state
            }
            rows[name].append(cell)
    head = ["drafter", *(f"{budget} nodes" for budget in options.budgets)]
    where = f"prompts {documents.start}..{documents.start + count - 1}"
    if options.tasks or options.chat:
        where = f"{count} questions of Spec-Bench" + (", in chat" if options.chat else "")
    lines = [f"**{model.name}, {where}** (state {' / '.join(options.state)})", ""]
    lines += [_row(head), _row(["---"] * len(head))]
    for name, cells in rows.items():
        rates = (" / ".join(f"{found.rate:.2f}" for found in cell.values()) for cell in cells)
        lines.append(_row([f"`{name}`", *rates]))
    return "\n".join(lines + list(_comparisons(rows)))


def _comparisons(rows: dict[str, list[dict[str, Counts]]]) -> Iterator[str]:
    single = {name: cells for name, cells in rows.items() if not name.startswith("blend")}
    for name in rows.keys() - single.keys():
        if single:
            best = [
                {
                    state: max((c[at][state] for c in single.values()), key=lambda one: one.rate)
                    for state in cell
                }
                for at, cell in enumerate(rows[name])
            ]
            yield _ratios(f"`{name}` over the best of the others", rows[name], best)
        if BASE in rows:
            yield _ratios(f"`{name}` over `{BASE}`", rows[name], rows[BASE])
        if len(rows[name][0]) == 2:
            ours = [{"": cell["carried"]} for cell in rows[name]]
            yield _ratios(
                f"`{name}` carried over reset", ours, [{"": cell["reset"]} for cell in rows[name]]
            )


def _ratios(
    title: str, cells: Sequence[dict[str, Counts]], base: Sequence[dict[str, Counts]]
) -> str:
    """All drafters give the same tokens, so that a ratio of rates is one of passes."""
    texts = []
    for ours, theirs in zip(cells, base, strict=True):
        ratios = [total_ratio(theirs[state].passes, ours[state].passes) for state in ours]
        texts.append(" / ".join(f"{r.value:.2f}x ({r.low:.2f} to {r.high:.2f})" for r in ratios))
    return _row([title, *texts])


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
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("--new", type=int, help="tokens of an answer; 100, in a chat 128")
    parser.add_argument("--state", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--format", default="auto", help="of the weights")
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--stop", action="store_true", help="honour the model's stop tokens")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    options = parser.parse_args()
    options.state = [state for state in STATES if state in options.state]
    options.new = options.new or (128 if options.chat else NEW)
    for model in options.models:
        for documents in options.documents:
            print(table(model, documents, options), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
