"""JSON schemas of jsonschemabench on one model: coverage, validity, mask times, tokens per pass.

    python benchmarks/grammars.py ../shared/models/stories260K [--schemas 300] [--drafter NAME ...]

Schemas are taken evenly from its six sets. Each gives one output at temperature 1, of at most 200
tokens, with each drafter at a budget of 16 nodes; a drafter keeps what it learns. Finished outputs
are checked with jsonschema. `blind`: drafts are not filtered by the grammar. Time of a mask:
matcher, mask and its use on the logits, for each visited node, with `blend`. Tokens per pass are
the same on any machine; times are not.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import jsonschema
import numpy as np

from paceline import LM
from paceline.control.structured.matcher import Matcher
from paceline.errors import PacelineError

SHARED = Path(__file__).resolve().parents[2] / "shared"
SETS = sorted((SHARED / "data" / "jsonschemabench").glob("*.jsonl.gz"))
DRAFTERS = ("recycle, blind", "recycle", "forced", "blend:members=predicted_output", "blend")
PROMPT = "Once upon a time there was a computer that wrote:\n"
NEW = 200


def schemas(count: int) -> list[dict[str, Any]]:
    """Evenly from all sets."""
    found = []
    for path in SETS:
        lines = gzip.decompress(path.read_bytes()).splitlines()
        share = count // len(SETS)
        found += [json.loads(lines[i * len(lines) // share])["schema"] for i in range(share)]
    return found


def reason(error: PacelineError) -> str:
    """Return the reason for a refusal, without values that differ from schema to schema."""
    return str(error).partition(": ")[2][:60] or str(error)[:60]


def verdict(text: str, schema: dict[str, Any]) -> str:
    """Whether a finished output is valid."""
    try:
        jsonschema.validators.validator_for(schema)(schema).validate(json.loads(text))
    except (jsonschema.ValidationError, json.JSONDecodeError) as error:
        return f"invalid ({str(error).splitlines()[0][:60]})"
    except Exception as error:
        return f"not checked ({type(error).__name__})"
    return "valid"


def main() -> None:
    """Compile all, generate with each drafter, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--drafter", action="append", help="one of the table; more than once")
    words = parser.parse_args()

    lm = LM(words.model, drafter="plain", budget=0)
    refused: Counter[str] = Counter()
    usable, compiling = [], []
    for schema in schemas(words.schemas):
        start = perf_counter()
        try:
            lm.request(PROMPT, schema=schema)
        except PacelineError as error:
            refused[reason(error)] += 1
            continue
        compiling.append(perf_counter() - start)
        usable.append(schema)
    ms = np.quantile(compiling, [0.5, 0.99, 1.0]) * 1e3
    print(f"{len(usable)} schemas compiled, {sum(refused.values())} refused; ", end="")
    print(f"compile median {ms[0]:.1f} ms, p99 {ms[1]:.1f} ms, most {ms[2]:.1f} ms\n")
    for name, count in refused.most_common():
        print(f"- {count} {name}")

    print("\n| drafter | tokens | tokens per pass | of finished ones | nodes per pass | outputs |")
    print("|---|---|---|---|---|---|")
    reference: list[list[int] | None] = []
    filtered = Matcher.extensions
    for name in words.drafter or DRAFTERS:
        name, _, blind = name.partition(", ")
        lm = LM(words.model, drafter=name, budget=16)
        Matcher.extensions = everything if blind else filtered
        clock = Clock()
        if name == "blend":
            clock.watch(Matcher)
        outputs, failed = [], 0
        for seed, schema in enumerate(usable):
            options = {"temperature": 1.0, "seed": seed, "max_new_tokens": NEW, "controls": {}}
            try:
                outputs.append(lm.generate(PROMPT, schema=schema, **options))
            except PacelineError as error:
                failed += 1
                print("failed:", error)
                outputs.append(None)
        done = [output for output in outputs if output is not None]
        whole = [output for output in done if output.finish == "stop"]
        tokens, ended = (sum(len(o.tokens) for o in group) for group in (done, whole))
        passes, until = (sum(o.passes for o in group) for group in (done, whole))
        nodes = sum(output.nodes for output in done)
        finished = [i for i, o in enumerate(outputs) if o is not None and o.finish == "stop"]
        texts = [None if o is None else o.tokens for o in outputs]
        reference = reference or texts
        same = "identical" if texts == reference else "DIFFERENT"
        print(
            f"| `{name}` {blind} | {tokens} | {tokens / passes:.2f} "
            f"| {ended / until:.2f} | {nodes / passes:.1f} | {same} |"
        )
    checks = Counter(verdict(outputs[i].text, usable[i]) for i in finished)
    clock.close()
    for what, seconds in ("a draw", clock.draws), ("a token, with guesses", clock.tokens):
        us = np.quantile(seconds or [np.nan], [0.5, 0.99, 1.0]) * 1e6
        print(f"\nmasks of {what}: median {us[0]:.0f} us, p99 {us[1]:.0f} us, most {us[2]:.0f} us")
    print(f"\n({len(clock.draws)} draws, vocabulary of {lm.vocabulary.size})\n")
    for name, count in checks.most_common():
        print(f"- {count} of the {len(finished)} finished are {name}")


def everything(self: Any, history: list[int], tree: Any) -> Any:
    """Keep the whole tree: a filter that drops nothing and adds nothing."""
    return np.ones(len(tree), bool), {}


class Clock:
    """Processor seconds of masks, of one thread: nobody else's work is in them.

    A draft asks for the masks behind its guesses, a draw for the one behind the text, which the
    draft may have brought. What a pass needs in all is shared by the tokens that it gives.
    """

    def __init__(self) -> None:
        self.draws: list[float] = []  # of each draw
        self.tokens: list[float] = []  # of each token, with those for guesses
        self._pass: list[float] = []
        self._guesses = 0.0

    def watch(self, kind: type[Any]) -> None:
        """Measure a kind of matcher from now on."""
        masks, mask, apply = kind.masks, kind._mask, kind.apply

        def next_pass(*words: Any) -> Any:
            self.close()
            start = thread_time()
            found = masks(*words)
            self._guesses += thread_time() - start
            return found

        def guess(*words: Any) -> Any:
            start = thread_time()
            found = mask(*words)
            self._guesses += thread_time() - start
            return found

        def draw(*words: Any) -> Any:
            start = thread_time()
            found = apply(*words)
            self._pass.append(thread_time() - start)
            return found

        kind.masks, kind._mask, kind.apply = next_pass, guess, draw

    def close(self) -> None:
        """Record a pass."""
        if self._pass:
            each = (self._guesses + sum(self._pass)) / len(self._pass)
            self.tokens += [each] * len(self._pass)
            self.draws += self._pass
            self._pass, self._guesses = [], 0.0


if __name__ == "__main__":
    main()
