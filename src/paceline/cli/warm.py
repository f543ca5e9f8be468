"""`paceline warm`: a warm start for drafters, from text that the model writes itself."""

from __future__ import annotations

from time import perf_counter
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import document, say
from paceline.cli.progress import counting


def warm(
    model: options.ModelOption = None,
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 50_000,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.7,
    seed: options.PlainSeed = 0,
    engine: options.EngineOptions,
    json: options.Json = False,
) -> None:
    """Record text that a model generates, so that drafters know it from the first request.

    The text and the model's top predictions are kept in the user's cache folder. `recycle` and
    `blend` start from them; `warm=false` in their settings ignores them. Outputs do not change.
    """
    from paceline.models.trace import trace_path, write_trace
    from paceline.training.self_text import selftext

    lm = engine.open(model, "plain", 0)
    start = perf_counter()
    with counting(tokens, "tokens") as tick:
        trace = selftext(
            lm.engine,
            tokens,
            lm.tokenizer.encode(""),
            frozenset(lm.model.defaults.stop_tokens),
            temperature,
            seed,
            tick,
        )
    path = trace_path(lm.model)
    write_trace(path, trace)
    seconds = perf_counter() - start
    say(
        f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: {len(trace)} tokens in "
        f"{len(trace.starts)} texts, {seconds:.1f} s"
    )
    if json:
        document(
            {
                "path": str(path),
                "tokens": len(trace),
                "texts": len(trace.starts),
                "temperature": temperature,
                "seed": seed,
                "seconds": seconds,
            }
        )
