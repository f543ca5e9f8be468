"""llguidance, which Paceline uses, beside xgrammar: coverage, soundness, compile and mask times.

    python benchmarks/grammar_libraries.py ../shared/models/tinystories-instruct-3m-chat

Needs xgrammar, which Paceline does not: `pip install --no-deps xgrammar apache-tvm-ffi`. Both get
the same vocabulary, schemas and spaces. Schemas are taken evenly from the six sets of
jsonschemabench; the model writes one text for each at temperature 1, which both then follow token
by token for as long as they accept it. JSON Schema's own tests say what a compiled grammar accepts.
Each schema is compiled and followed in a process of its own, which ends after `--limit` seconds of
processor time: that grammar is counted as cut. Times are of the processor, one thread; a mask's
time is that of its bits alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import thread_time
from typing import Any, Protocol

import numpy as np
import xgrammar
from grammars import PROMPT, SHARED, schemas

from paceline import LM
from paceline.control.grammar import Grammar, _compiled
from paceline.errors import PacelineError

NEW = 100


class Matcher(Protocol):
    """What both are asked for."""

    def mask(self) -> None: ...

    def take(self, token: int) -> bool: ...

    def whole(self) -> bool: ...


class Library(Protocol):
    """Makes as many matchers as one likes of a schema that is compiled once."""

    def compile(self, schema: Any) -> Callable[[], Matcher]: ...


class LLGuidance:
    """As `control/grammar.py` uses it, without its cache."""

    def __init__(self, lm: LM) -> None:
        self.vocabulary = lm.vocabulary
        self.stops = tuple(sorted(lm.model.defaults.stop_tokens))
        self.number = 0

    def compile(self, schema: Any) -> Callable[[], Matcher]:
        self.number += 1  # another text, another grammar
        text = " " * self.number + json.dumps(schema)
        compiled = _compiled(Grammar(text, "json"), self.vocabulary, self.stops)
        return lambda: _LL(compiled.deep_copy())


class _LL:
    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self.bits = np.zeros(len(np.frombuffer(matcher.compute_bitmask(), np.uint32)), np.uint32)
        self.place = self.bits.ctypes.data

    def mask(self) -> None:
        self.matcher.unsafe_compute_mask_ptr(self.place, self.bits.nbytes)

    def take(self, token: int) -> bool:
        return self.matcher.try_consume_tokens([token]) == 1

    def whole(self) -> bool:
        return self.matcher.is_accepting()


class XGrammar:
    """With the same spaces; keywords that it does not know it leaves out."""

    def __init__(self, lm: LM) -> None:
        words = lm.vocabulary
        tokenizer = xgrammar.TokenizerInfo(
            list(words.pieces),
            xgrammar.VocabType.RAW,
            vocab_size=words.size,
            stop_token_ids=sorted(lm.model.defaults.stop_tokens),
        )
        self.bits = xgrammar.allocate_token_bitmask(1, words.size)
        self.compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)

    def compile(self, schema: Any) -> Callable[[], Matcher]:
        compiled = self.compiler.compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(", ", ": "), strict_mode=False
        )
        made = xgrammar.GrammarMatcher
        return lambda: _XG(made(compiled, terminate_without_stop_token=False), self.bits)


class _XG:
    def __init__(self, matcher: Any, bits: Any) -> None:
        self.matcher, self.bits = matcher, bits

    def mask(self) -> None:
        self.matcher.fill_next_token_bitmask(self.bits, 0)

    def take(self, token: int) -> bool:
        return self.matcher.accept_token(token)

    def whole(self) -> bool:
        return self.matcher.is_completed()


def written(lm: LM, found: list[Any]) -> list[list[int]]:
    """Return a text for each schema, without its end; nothing where it is refused."""
    texts = []
    for seed, schema in enumerate(found):
        options = {"temperature": 1.0, "seed": seed, "max_new_tokens": NEW, "controls": {}}
        try:
            tokens = lm.generate(PROMPT, schema=schema, **options).tokens
        except PacelineError:
            tokens = []
        texts.append([t for t in tokens if t not in lm.model.defaults.stop_tokens])
    return texts


def quantiles(seconds: list[float], unit: float) -> str:
    """Median, 99th percentile and most."""
    return " | ".join(f"{q * unit:.1f}" for q in np.quantile(seconds, [0.5, 0.99, 1.0]))


def apart(limit: int, call: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Return what `call` reports from a process that may use `limit` seconds."""
    fork = get_context("fork")
    hears, tells = fork.Pipe(duplex=False)

    def run(tells: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        call(tells.send)

    child = fork.Process(target=run, args=(tells,))
    child.start()
    tells.close()
    try:
        while True:
            yield hears.recv()
    except EOFError:
        child.join()


def follow(library: Library, schema: Any, text: list[int], tell: Callable[[Any], None]) -> None:
    """Tell the seconds of compiling, or why not; then of each mask."""
    start = thread_time()
    try:
        matcher = library.compile(schema)()
    except (PacelineError, RuntimeError, ValueError) as error:
        tell(str(error).splitlines()[0][:70])
        return
    tell(thread_time() - start)
    for token in text:
        start = thread_time()
        matcher.mask()
        tell(thread_time() - start)
        if not matcher.take(token):
            break
    tell(None)  # it was followed as far as it goes


def judge(library: Library, lm: LM, group: Any, tell: Callable[[Any], None]) -> None:
    """Tell for each of a group's tests whether it is valid, and accepted."""
    try:
        make = library.compile(group["schema"])
    except (PacelineError, RuntimeError, ValueError):
        return
    tell(None)  # it compiled
    for test in group["tests"]:
        matcher = make()
        text = json.dumps(test["data"], ensure_ascii=False).encode()
        ok = all(map(matcher.take, lm.vocabulary.inside(text))) and matcher.whole()
        tell((test["valid"], ok))


def sound(library: Library, lm: LM, limit: int) -> Counter[str]:
    """Return the results of JSON Schema's own required tests, draft 2020-12."""
    counts: Counter[str] = Counter()
    path = SHARED / "data" / "json-schema-test-suite" / "tests.jsonl.gz"
    for line in gzip.decompress(path.read_bytes()).splitlines():
        found = json.loads(line)
        if "/" in found["file"].removeprefix("tests/draft2020-12/"):
            continue
        for group in found["groups"]:
            counts["groups"] += 1
            for result in apart(limit, partial(judge, library, lm, group)):
                if result is None:
                    counts["compiled"] += 1
                    continue
                kind = "valid" if result[0] else "invalid"
                counts[kind] += 1
                counts[f"{kind} accepted"] += result[1]
    return counts


def main() -> None:
    """Measure both and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--limit", type=int, default=10, help="seconds for one schema")
    words = parser.parse_args()
    lm = LM(words.model, drafter="plain", budget=0)
    found = schemas(words.schemas)
    libraries: dict[str, Library] = {"llguidance": LLGuidance(lm), "xgrammar": XGrammar(lm)}
    refused: dict[str, list[str]] = {name: [] for name in libraries}
    compiling, masking = ({name: list[float]() for name in libraries} for _ in range(2))
    lm.request(PROMPT, schema={})  # what is made once for a model
    for schema, text in zip(found, written(lm, found), strict=True):
        for name, library in libraries.items():
            result = list(apart(words.limit, partial(follow, library, schema, text)))
            first = result[0] if result else f"cut after {words.limit} seconds"
            if isinstance(first, str):
                refused[name].append(first)
                continue
            compiling[name].append(first)
            masking[name] += [seconds for seconds in result[1:] if seconds is not None]
            if result[-1] is not None:
                print(f"{name} was cut while it followed a text, after {len(result) - 1} masks")
    print("|  | compiled | compile ms: median | p99 | most | mask us: median | p99 | most |")
    print("|---|---|---|---|---|---|---|---|")
    for name in libraries:
        times = f"{quantiles(compiling[name], 1e3)} | {quantiles(masking[name], 1e6)}"
        print(f"| {name} | {len(compiling[name])} of {len(found)} | {times} |")
    counts = " and ".join(f"{len(masking[name])} of {name}" for name in libraries)
    print(f"\nMasks: {counts}; vocabulary of {lm.vocabulary.size}\n")
    for name, errors in refused.items():
        for error, count in Counter(errors).most_common(12):
            print(f"- {name}: {count} {error}")
    print(
        "\n| JSON Schema tests | groups compiled | valid accepted | invalid accepted |", flush=True
    )
    print("|---|---|---|---|")
    for name, library in libraries.items():
        c = sound(library, lm, words.limit)
        print(
            f"| {name} | {c['compiled']} of {c['groups']} | {c['valid accepted']} of {c['valid']} "
            f"| {c['invalid accepted']} of {c['invalid']} |"
        )


if __name__ == "__main__":
    os.environ.setdefault("XGRAMMAR_LOG_LEVEL", "ERROR")
    main()
