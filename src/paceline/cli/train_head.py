"""`paceline train-head`: a trained head for the drafter `head`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import document, say
from paceline.cli.progress import counting
from paceline.errors import RequestError


def train_head(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    method: Annotated[
        str, typer.Option(help="Architecture, as NAME:key=value; see `paceline methods`.")
    ] = "recurrent",
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the model's answers.")] = 100_000,
    minutes: Annotated[
        float, typer.Option(min=0, help="Longest training; the answers come on top.")
    ] = 10.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the answers at most.")] = 6,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to answer: JSON lines or one a line. Default: a mix."),
    ] = None,
    seed: options.PlainSeed = 0,
    *,
    engine: options.EngineOptions,
    json: options.Json = False,
) -> None:
    """Train a head on a model's own answers.

    `--drafter head:path=FOLDER` drafts with it; outputs do not change. Progress is kept in
    FOLDER.work, so that the same command continues where it was stopped. Needs torch.
    """
    import torch

    from paceline.drafters.heads.base import Head
    from paceline.machine import usable_cores
    from paceline.measuring.prompts import first_turns
    from paceline.registry import heads
    from paceline.training.head_loop import HeadRecipe
    from paceline.training.heads import HeadTraining
    from paceline.training.prompt_mix import prompts_of

    if out.exists():
        raise RequestError(f"{out} exists already; give another folder, or delete it")
    torch.set_num_threads(usable_cores())
    head: Head = heads.parse(method)
    recipe = HeadRecipe(tokens, minutes, epochs, seed=seed)
    lm = engine.open(model, "plain", 0)
    start = perf_counter()
    training = HeadTraining(lm, head, out, recipe)
    with counting(tokens, "tokens written") as tick:
        training.write(
            prompts_of(lm, None if prompts is None else first_turns(prompts), seed), tick
        )
    with counting(training.total_steps, "steps") as tick:
        card = training.learn(tick)
    seconds = perf_counter() - start
    right = ", ".join(f"{card[f'right_at_{k}']:.0%}" for k in range(1, head.depth + 1))
    say(
        f"wrote {out}: {head.spec()}, right in {right} of held-out positions by depth, "
        f"{card['chain_tokens_per_pass']:.2f} tokens per pass as a chain, {seconds:.1f} s"
    )
    if json:
        document({"path": str(out), "head": head.spec(), "seconds": seconds, **card})
