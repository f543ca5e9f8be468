"""`paceline complete`: several continuations of a prompt, for a user to choose from."""

from __future__ import annotations

from time import perf_counter
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.generate import read_prompt
from paceline.cli.output import document, say, write


def complete(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from stdin.")
    ] = None,
    model: options.ModelOption = None,
    n: Annotated[int, typer.Option("-n", min=1, max=64, help="How many continuations.")] = 3,
    max_new_tokens: options.NewTokens = 10,
    method: Annotated[
        str, typer.Option(help="beam: -n nodes a pass; superposed: one, and less likely texts.")
    ] = "beam",
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Of superposed: weight of n-grams of the prompt and of what `paceline warm` "
            "kept. Default 0: none.",
        ),
    ] = None,
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    kv_format: options.KvFormat = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    chat: options.Chat = False,
    json: options.Json = False,
) -> None:
    """Suggest several continuations, likeliest first.

    Both methods take about the passes of one, and are lossy: likelier continuations may be
    missed. The scores are the logarithms of the chances that the model gives to what was found.
    """
    text = read_prompt(prompt)
    lm = options.EngineChoice(engine, device, threads, weight_format, kv_format).open(model)
    start = perf_counter()
    found = lm.complete(
        [{"role": "user", "content": text}] if chat else text,
        n,
        max_new_tokens=max_new_tokens,
        method=method,
        alpha=alpha,
    )
    seconds = perf_counter() - start
    if json:
        document(
            {
                "prompt": text,
                "completions": [one._asdict() for one in found],
                "method": method,
                "alpha": alpha,
                "seconds": seconds,
                "lossy": True,
            }
        )
        return
    for one in found:
        write(f"{one.score:8.2f}  {one.text!r}\n")
    say(f"{len(found)} continuations in {seconds:.2f} s; lossy: there may be likelier ones")
