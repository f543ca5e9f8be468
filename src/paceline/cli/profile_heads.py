"""`paceline profile-heads`: the patterns of heads for `--attention minference:profile=FILE`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from paceline.cli import options
from paceline.cli.files import read_text
from paceline.cli.output import check_target, document, say
from paceline.cli.progress import counting


def profile_heads(
    model: options.Model,
    text: Annotated[Path, typer.Argument(help="A text of the kind that is to be read, plain.")],
    out: Annotated[Path, typer.Argument(help="File to write, .json.")],
    budget: Annotated[
        int,
        typer.Option(
            min=64, help="Positions that a head reads besides the first and the last blocks."
        ),
    ] = 1024,
    tokens: Annotated[
        int, typer.Option(min=64, help="Tokens of the text that are read, from its beginning.")
    ] = 4096,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Find the pattern with which each head of a model reads long prompts best.

    The text is run once in full. Each head is then given A-shape, vertical-slash with several
    shares, and block-sparse, all of `--budget`; the pattern whose output is nearest wins. The other
    settings are those that `minference` has by default.
    """
    check_target(out)
    from paceline.attention.minference import MInference
    from paceline.engines import open_engine
    from paceline.engines.head_profile import candidates, find_profile, write_profile
    from paceline.models import load

    loaded = load(model)
    words = loaded.tokenizer.encode(read_text("the text", text))
    ids = np.array(words[: min(tokens, loaded.config.context)], np.int32)
    engine = open_engine(loaded, "native", threads=threads)
    rule, rules = MInference().sparse_prefill, candidates(budget)
    start = perf_counter()
    with counting(len(loaded.config.layers), "layers") as tick:
        profile = find_profile(engine, ids, rule, rules, tick)
    write_profile(out, profile)
    seconds = perf_counter() - start
    found = Counter(head.rule.name.lower() for layer in profile for head in layer)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    say(f"wrote {out}: {kinds}, {seconds:.1f} s")
    if json:
        document(
            {
                "path": str(out),
                "budget": budget,
                "tokens": len(ids),
                "heads": dict(sorted(found.items())),
                "seconds": seconds,
            }
        )
