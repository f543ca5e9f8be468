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
class CompletionOptions:
    """Continuations."""

    n: Annotated[int, typer.Option("-n", min=1, max=64, help="How many continuations.")] = 3
    max_new_tokens: options.NewTokens = 10
    method: Annotated[
        str,
        typer.Option(
            help="beam: -n nodes a pass; superposed: one node a pass, and less likely texts."
        ),
    ] = "beam"
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="For superposed: weight of n-grams of the prompt and of the trace that `paceline "
            "warm` recorded. Default 0: none.",
        ),
    ] = None


def complete(
    prompt: options.Text = None,
    model: options.ModelOption = None,
    *,
    completion: CompletionOptions,
    engine: options.EngineOptions,
    chat: options.Chat = False,
    json: options.Json = False,
) -> None:
    """Suggest several continuations, the most likely first.

    Both methods take about as many passes as one continuation, and are lossy: they may miss more
    likely ones. Scores are log-probabilities under the model.
    """
    text = read_prompt(prompt)
    lm = engine.open(model)
    start = perf_counter()
    asked: Prompt = [{"role": "user", "content": text}] if chat else text
    completions = lm.complete(asked, **asdict(completion))
    seconds = perf_counter() - start
    if json:
        document(
            {
                "prompt": text,
                "completions": [one._asdict() for one in completions],
                "method": completion.method,
                "alpha": completion.alpha,
                "seconds": seconds,
                "lossy": True,
            }
        )
        return
    for one in completions:
        write(f"{one.score:8.2f}  {one.text!r}\n")
    say(f"{len(completions)} continuations in {seconds:.2f} s; lossy: there may be likelier ones")
