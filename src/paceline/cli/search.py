"""`paceline generate --strategy`: a search instead of one text, its outputs and what they cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from paceline.cli.output import document, say, write
from paceline.compatibility import Side, check

if TYPE_CHECKING:
    from paceline.decoding.strategies.base import SearchOutput, Strategy
    from paceline.lm import LM

_DRAFTING = ("drafter", "budget", "walk", "prediction", "learnt")


def chosen(context: typer.Context, text: str) -> Strategy:
    """Return the strategy that `--strategy` names.

    Raises:
        MethodError: there is none such, or an option was given that it has no use for.
    """
    from paceline.registry import strategies

    strategy: Strategy = strategies.parse(text)
    idle = ["check"] if strategy.drafts else [*_DRAFTING, "check"]
    for option in idle:
        source = context.get_parameter_source(option)
        if source is not None and source.name != "DEFAULT":
            own = f"--strategy {strategy.name}"
            compared = option == "check"
            check(
                {
                    Side.SEARCH if compared else Side.DRAFTLESS_SEARCH: own,
                    Side.COMPARISON if compared else Side.DRAFT_OPTION: f"--{option}",
                }
            )
    return strategy


def deliver(lm: LM, name: str, outputs: list[SearchOutput], json: bool) -> None:
    """Print the outputs, best first, and what the search cost; exit 130 if it was interrupted."""
    if json:
        document(_described(lm, name, outputs))
    else:
        write("\n\n".join(output.text for output in outputs) + "\n")
    cost, tokens = outputs[0], sum(len(output.tokens) for output in outputs)
    scores = ", ".join(f"{output.score:.3f}" for output in outputs)
    seconds = cost.seconds
    guide = f", {seconds.guide / seconds.decode:.0%} guiding" if seconds.guide else ""
    say(
        f"{name}: {len(outputs)} of {tokens} tokens, {cost.passes} passes over {cost.nodes} nodes, "
        f"{seconds.decode:.2f} s{guide}; scores {scores}"
    )
    if any(output.finish == "interrupted" for output in outputs):
        raise typer.Exit(130)


def _described(lm: LM, name: str, outputs: list[SearchOutput]) -> dict[str, Any]:
    cost = outputs[0]
    return {
        "strategy": name,
        "outputs": [
            {
                "text": output.text,
                "tokens": output.tokens,
                "score": output.score,
                "finish": output.finish,
            }
            for output in outputs
        ],
        "passes": cost.passes,
        "nodes": cost.nodes,
        "seconds": asdict(cost.seconds),
        "engine": lm.engine.name,
        "format": lm.engine.format,
        "kv_format": lm.engine.kv_format,
    }
