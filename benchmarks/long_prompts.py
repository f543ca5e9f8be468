"""Tokens per pass of drafters behind long prompts, as a Markdown table.

    python benchmarks/long_prompts.py MODEL --texts books.txt --length 4000 --count 3

TEXTS is one text, or a `.jsonl` or `.jsonl.xz` file with `text` in each line. A prompt is the first
`--length` tokens of a text and a task: to quote the passage in their middle that begins with some
words (`quote`), or to go on (`continue`). The prompt is run once, and all arms go on from its keys
and values, greedily, and must write the same.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paceline import LM
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.registry import drafters

ARMS = ("plain", "blend:warm=false", "sparse_kv:least=1.0", "retrieved_context:least=1.0")
TASKS = ("quote", "continue")
_BEGINNING = 12  # words of the passage to quote


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file."""
    if path.suffix not in (".jsonl", ".xz"):
        yield path.read_text(encoding="utf-8")
        return
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield str(json.loads(line)["text"])


def prompt(lm: LM, text: str, length: int, task: str) -> list[int]:
    """Return the tokens of a prompt of `length` tokens and a task behind them."""
    head = lm.tokenizer.decode(lm.tokenizer.encode(text[: 8 * length])[:length])
    if task == "continue":
        return lm.tokenizer.encode(head)
    passage = head[len(head) // 2 :].split()[1 : 1 + _BEGINNING]
    question = f'\n\nQuote the passage of the text above that begins:\n\n"{" ".join(passage)}'
    return lm.tokenizer.encode(head + question)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--drafters", nargs="+", default=list(ARMS))
    options = parser.parse_args()
    lm = LM(options.model, drafter="plain", budget=0)
    some = [text for text, _ in zip(texts(options.texts), range(options.count), strict=False)]
    print(f"| task | {' | '.join(options.drafters)} |\n|---|{'---|' * len(options.drafters)}")
    for task in options.tasks:
        tokens, passes = np.zeros(len(options.drafters)), np.zeros(len(options.drafters))
        for text in some:
            ids = prompt(lm, text, options.length, task)
            request = lm.request(ids, max_new_tokens=options.new, temperature=0.0, ignore_eos=True)
            add(lm, request, options.drafters, options.budget, tokens, passes)
        rates = " | ".join(f"{rate:.2f}" for rate in tokens / passes)
        print(f"| {task} | {rates} |", flush=True)


def add(
    lm: LM, request: Request, specs: list[str], budget: int, tokens: np.ndarray, passes: np.ndarray
) -> None:
    """Decode a request with each drafter; add its tokens and passes."""
    read, expected = lm.engine.start(np.array(request.prompt[:-1], np.int32)), None
    for arm, spec in enumerate(specs):
        drafter = drafters.parse(spec).build(lm.draft_target)
        nodes = Fixed(budget if drafter.drafts else 0)
        own = lm.engine.fork(read)
        output = Generation(lm.engine, drafter, request, nodes, sequence=own).run()
        expected = expected or output.tokens
        if output.tokens != expected:
            raise SystemExit(f"{spec} differs from {specs[0]}")
        tokens[arm] += len(output.tokens)
        passes[arm] += output.passes
        drafter.reset()
    lm.engine.release(read)


if __name__ == "__main__":
    main()
