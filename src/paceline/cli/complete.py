"""`paceline complete`: several continuations of a prompt, for a user to choose from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.files import read_prompt
from paceline.cli.output import document, say, write

if TYPE_CHECKING:
    from paceline.lm import Prompt


@dataclass(frozen=True)
class Suggesting:
    """What is suggested."""

    n: Annotated[int, typer.Option("-n", min=1, max=64, help="How many continuations.")] = 3
    max_new_tokens: options.NewTokens = 10
    method: Annotated[
        str, typer.Option(help="beam: -n nodes a pass; superposed: one, and less likely texts.")
    ] = "beam"
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Of superposed: weight of n-grams of the prompt and of what `paceline warm` "
            "kept. Default 0: none.",
        ),
    ] = None


def complete(
    prompt: options.Text = None,
    model: options.ModelOption = None,
    *,
    suggesting: Suggesting,
    engine: options.EngineChoice,
    chat: options.Chat = False,
    json: options.Json = False,
) -> None:
    """Suggest several continuations, likeliest first.

    Both methods take about the passes of one, and are lossy: likelier continuations may be
    missed. The scores are the logarithms of the chances that the model gives to what was found.
    """
    text = read_prompt(prompt)
    lm = engine.open(model)
    start = perf_counter()
    asked: Prompt = [{"role": "user", "content": text}] if chat else text
    found = lm.complete(asked, **asdict(suggesting))
    seconds = perf_counter() - start
    if json:
        document(
            {
                "prompt": text,
                "completions": [one._asdict() for one in found],
                "method": suggesting.method,
                "alpha": suggesting.alpha,
                "seconds": seconds,
                "lossy": True,
            }
        )
        return
    for one in found:
        write(f"{one.score:8.2f}  {one.text!r}\n")
    say(f"{len(found)} continuations in {seconds:.2f} s; lossy: there may be likelier ones")
