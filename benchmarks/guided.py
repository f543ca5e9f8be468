"""What drafting gains where a guide runs a second model, as Markdown tables.

    python benchmarks/guided.py ../shared/models/bitstories-3M \
      ../shared/models/tinystories-instruct-3m-chat

Plain decoding and `blend` take turns under each guide, in one process, and must write the same: new
tokens for each second of decoding, medians over the rounds. Greedy, 64 new tokens after the first
48 of some documents of stories-val. What a drafter learns is carried from prompt to prompt and
forgotten before every round. `guide` is the share of the decoding time that passes of guides took.
The guides are two small models with the tokens of MODEL; for the chat model there are none, so that
`proxy` and `contrastive` run it beside itself there: what they cost is true, what they say is not.

Models this small fit the cache, where a pass over a tree costs what its nodes cost and drafting has
nothing to gain; an inflated one (see README.md) is read from memory in every pass:

    python benchmarks/guided.py build/stories-135m --format int8 --count 3 --rounds 3
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

from drafters import SHARED, prompts
from paceline import LM
from paceline.core import Output
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Drafter
from paceline.machine import machine, versions
from paceline.models import load
from paceline.models.tokenizer import same_tokens
from paceline.registry import drafters

PROMPT, NEW = 48, 64
BESIDE = ("bitstories-1M", "stories260K")  # the larger one first


class Arm(NamedTuple):
    """A way to decode."""

    name: str
    drafter: Drafter
    budget: Budget


def guides(lm: LM) -> dict[str, str]:
    """Guides by name, none first."""
    own = lm.model.path
    near = [SHARED / "models" / name for name in BESIDE]
    right = all(same_tokens(load(path).tokenizer, lm.tokenizer) for path in near)
    large, small = near if right else (own, own)
    return {
        "none": "",
        "cfg": "cfg:negative=A sad dog,scale=1.5",
        "cfg, stop=0.1": "cfg:negative=A sad dog,scale=1.5,stop=0.1",
        "proxy": f"proxy:{large},{small}",
        "contrastive": f"contrastive:{small}",
    }


def round_of(lm: LM, arm: Arm, guide: str, asked: list[list[int]]) -> list[Output]:
    """All prompts once, beginning with nothing learnt."""
    arm.drafter.reset()
    found = []
    for ids in asked:
        request = lm.request(
            ids, max_new_tokens=NEW, temperature=0, controls="", guide=guide or (), ignore_eos=True
        )
        found.append(Generation(lm.engine, arm.drafter, request, arm.budget).run())
    return found


def table(path: Path, options: argparse.Namespace) -> str:
    """One model under each guide."""
    lm = LM(
        path, drafter="blend", budget=options.budget, threads=options.threads, dtype=options.format
    )
    asked = [ids[:PROMPT] for ids in prompts(lm, slice(options.count))]
    arms = [
        Arm("plain", drafters.parse("plain").build(lm.draft_target), Fixed(0)),
        Arm("blend", lm.drafter, lm.budget),
    ]
    specs = guides(lm)
    rounds: dict[tuple[str, str], list[list[Output]]] = defaultdict(list)
    for turn in range(options.rounds + 1):
        for guide, spec in specs.items():
            for arm in arms if turn % 2 else arms[::-1]:
                outputs = round_of(lm, arm, spec, asked)
                if turn:  # the first one warms up
                    rounds[guide, arm.name].append(outputs)
    what = f"{path.name}, {lm.engine.format}, {len(asked)} prompts, budget {options.budget}"
    lines = [f"**{what}**", ""]
    lines += [
        "| guide | plain, tokens/s | guide | blend, tokens/s | guide | tokens per pass | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(guide, rounds) for guide in specs])


def row(guide: str, rounds: dict[tuple[str, str], list[list[Output]]]) -> str:
    """Both arms under one guide."""
    plain, blend = rounds[guide, "plain"], rounds[guide, "blend"]
    texts = [[output.tokens for output in outputs] for outputs in plain + blend]
    if any(text != texts[0] for text in texts):
        raise SystemExit(f"under the guide {guide} both did not write the same")
    gains = [speed(b) / speed(a) for a, b in zip(plain, blend, strict=True)]
    cells = [f"`{guide}`"]
    for found in (plain, blend):
        cells += [f"{median(map(speed, found)):.0f}", f"{median(map(guiding, found)):.0%}"]
    passes = [sum(output.passes for output in outputs) for outputs in blend]
    tokens = sum(map(len, texts[0]))
    cells += [f"{tokens / median(passes):.2f}", f"**{median(gains):.2f}x**"]
    return "| " + " | ".join(cells) + " |"


def speed(outputs: list[Output]) -> float:
    """Tokens a second of decoding, over some outputs."""
    decode = sum(output.seconds.decode for output in outputs)
    return sum(len(output.tokens) for output in outputs) / decode


def guiding(outputs: list[Output]) -> float:
    """Return the share of decoding that passes of guides took."""
    guide = sum(output.seconds.guide for output in outputs)
    return guide / sum(output.seconds.decode for output in outputs)


def main() -> None:
    """Parse the command line, print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--budget", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--format", default="auto")
    parser.add_argument("--count", type=int, default=6, help="prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(budget="auto")
    options = parser.parse_args()
    for path in options.models:
        print(table(path, options), end="\n\n", flush=True)
    here = machine()
    print(f"{here['processor']}, {options.threads} thread(s), commit {versions()['commit']}")


if __name__ == "__main__":
    main()
