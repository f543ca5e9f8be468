"""`paceline warm`: a warm start for drafters, from text that the model writes itself."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import document, say
from paceline.cli.progress import counting
from paceline.errors import RequestError


def warm(
    model: options.ModelOption = None,
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 100_000,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to answer: JSON lines or one a line. A chat model without this option "
            "answers a mix of questions, code, translation, summaries and role play."
        ),
    ] = None,
    free: Annotated[
        bool, typer.Option("--free", help="Write texts without a prompt, with a chat model, too.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.7,
    seed: options.PlainSeed = 0,
    engine: options.EngineOptions,
    json: options.Json = False,
) -> None:
    """Record text that a model generates, so that drafters know it from the first request.

    A chat model answers prompts, any other writes texts of its own. The text and the model's top
    predictions are kept in the user's cache folder. `recycle` and `blend` start from them;
    `warm=false` in their settings ignores them. Outputs do not change.
    """
    from paceline.measuring.prompts import first_turns
    from paceline.models.trace import trace_path, write_trace
    from paceline.training.prompt_mix import prompts_of
    from paceline.training.self_text import self_answers, selftext

    if free and prompts is not None:
        raise RequestError("--free writes without prompts; leave --free or --prompts out")
    lm = engine.open(model, "plain", 0)
    start = perf_counter()
    free = free or (prompts is None and lm.tokenizer.template is None)
    stops = frozenset(lm.model.defaults.stop_tokens)
    with counting(tokens, "tokens") as tick:
        if free:
            opening = lm.tokenizer.encode("")
            trace = selftext(lm.engine, tokens, opening, stops, temperature, seed, tick)
        else:
            asked = prompts_of(lm, None if prompts is None else first_turns(prompts), seed)
            trace = self_answers(lm.engine, tokens, asked, stops, temperature, seed, tick)
    path = trace_path(lm.model)
    write_trace(path, trace)
    seconds = perf_counter() - start
    kind = "texts" if free else "answers"
    say(
        f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: {len(trace)} tokens in "
        f"{len(trace.starts)} {kind}, {seconds:.1f} s"
    )
    if json:
        document(
            {
                "path": str(path),
                "kind": kind,
                "tokens": len(trace),
                "texts": len(trace.starts),
                "temperature": temperature,
                "seed": seed,
                "seconds": seconds,
            }
        )
