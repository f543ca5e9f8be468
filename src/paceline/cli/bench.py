"""`paceline bench`: speed against plain decoding on this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import say, show
from paceline.cli.progress import counting
from paceline.cli.work import deliver, prepare


class State(StrEnum):
    """What drafters know when a prompt begins."""

    carried = "carried"
    reset = "reset"


def bench(
    model: options.Models,
    prompts: options.Prompts,
    drafters: options.Drafters = ["all"],  # noqa: B006
    budget: Annotated[
        str, typer.Option(help="Nodes beyond the root or auto; one or more, with commas.")
    ] = "16",
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Rounds over all prompts.")] = 3,
    limit: options.Limit = None,
    max_new_tokens: options.NewTokens = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    state: Annotated[
        State, typer.Option(help="Drafters keep what they learnt from prompt to prompt, or not.")
    ] = State.carried,
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    chat: options.Chat = False,
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Measure drafters against plain decoding.

    Arms take turns on each prompt; each round starts from drafters that know nothing. All arms
    decode the same number of tokens, past the end of the text if need be. Turns and clipped
    prompts are as in `paceline prove`. Exit 1 if an output differs that may not.
    """
    nodes = options.budgets(budget)
    choice = options.EngineChoice(engine, device, threads, weight_format)
    work = prepare(model, prompts, drafters, limit, choice, out)
    from paceline.measuring import bench as measure
    from paceline.measuring import report
    from paceline.measuring.turns import Asking

    asking = Asking(max_new_tokens, temperature, seed, chat, ignore_eos=True)
    carried = state is State.carried
    with counting(work.turns * (repeat + 1)) as tick:
        result = measure.bench(
            work.lm, work.methods, work.dialogues, asking, nodes, repeat, carried, tick
        )
    found = {
        "schema": "paceline-bench/1",
        **report.conditions(work.lm, model),
        "settings": {
            "file": str(prompts),
            "lines": len(work.dialogues),
            "turns": work.turns,
            "repeat": repeat,
            "budgets": nodes,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "chat": chat,
            "ignore_eos": True,
            "state": state.value,
        },
        "left_out": work.left_out,
        **report.bench_document(result),
    }
    show(report.bench_tables(found), stdout=not json)
    work.tell(found["clipped"], work.turns)
    lossy = options.lossy(work.methods)
    for name in lossy:
        say(f"{name} is lossy: its outputs may differ from plain decoding's")
    arms = zip(result.arms, found["arms"], strict=True)
    different = sum(counts["different"] for arm, counts in arms if arm.spec not in lossy)
    if different:
        say(f"{different} outputs differ from plain decoding; `paceline prove` says where and why")
    deliver(found, out, json)
    if different and work.lm.engine.invariant:
        raise typer.Exit(1)
