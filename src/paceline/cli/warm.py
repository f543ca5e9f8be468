"""`paceline warm`: a warm start for drafters, from text that the model writes itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.output import document, say
from paceline.cli.progress import counting
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.lm import LM


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
    from paceline.models.trace import trace_path, write_trace
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
            asked = prompts_of(lm, prompts, seed)
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


def prompts_of(lm: LM, path: Path | None, seed: int) -> Iterable[list[int]]:
    """Return the token ids of prompts: of a file, or a mix; without a chat template, beginnings.

    Raises:
        RequestError: the file cannot be read.
    """
    from paceline.measuring.prompts import read_prompts
    from paceline.training.prompt_mix import mixed_prompts
    from paceline.training.self_text import bare_starts

    tokenizer = lm.tokenizer
    chats = tokenizer.template is not None

    def encode(text: str) -> list[int]:
        if chats:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text)

    if path is not None:
        return [encode(dialogue.turns[0]) for dialogue in read_prompts(path)]
    if chats:
        return map(encode, mixed_prompts(seed))
    return bare_starts(tokenizer.encode(""), lm.engine.config.vocab_size, seed)
