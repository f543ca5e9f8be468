"""`paceline distil-hmm`: a hidden Markov model of a model, for the control `keywords`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, say
from paceline.cli.progress import counting


def distil_hmm(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    states: Annotated[int, typer.Option(min=1, max=4096, help="Hidden states.")] = 64,
    samples: Annotated[
        int, typer.Option(min=1, help="Texts to generate; more where the model ends them early.")
    ] = 2000,
    length: Annotated[int, typer.Option(min=1, help="Maximum tokens of a text.")] = 128,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of expectation maximisation, each over all texts.")
    ] = 20,
    seed: options.PlainSeed = 0,
    *,
    engine: options.EngineOptions,
    json: options.Json = False,
) -> None:
    """Fit a hidden Markov model to texts that a model generates.

    `--keywords WORDS --hmm FILE` of `paceline generate` uses it. Progress is kept in FILE.work, so
    that the same command continues where it was stopped.
    """
    check_target(out)
    from paceline.training.hmm import Distillation, HmmRecipe

    recipe = HmmRecipe(states, samples, length, rounds, seed)
    lm = engine.open(model, "plain", 0)
    start = perf_counter()
    work = Distillation(lm.engine, lm.model, out, recipe)
    with counting(recipe.tokens, "tokens written") as tick:
        work.write(tick)
    with counting(rounds, "rounds of learning") as tick:
        _, likelihood = work.learn(tick)
    seconds = perf_counter() - start
    say(
        f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB: {states} states from {recipe.tokens} "
        f"tokens, {-likelihood:.2f} nats a token, {seconds:.1f} s"
    )
    if json:
        document(
            {
                "path": str(out),
                "states": states,
                "tokens": recipe.tokens,
                "rounds": rounds,
                "seed": seed,
                "nats_per_token": -likelihood,
                "seconds": seconds,
            }
        )
