"""`paceline bench`: speed against plain decoding on this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, save, say, show
from paceline.cli.progress import counting


class State(StrEnum):
    """What drafters know when a prompt begins."""

    carried = "carried"
    reset = "reset"


def bench(
    model: options.Model,
    prompts: options.Prompts,
    drafters: options.Drafters = ["all"],  # noqa: B006
    budget: Annotated[str, typer.Option(help="One or more, separated by commas.")] = "16",
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Rounds over all prompts.")] = 3,
    limit: options.Limit = None,
    max_new_tokens: options.NewTokens = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    state: Annotated[
        State, typer.Option(help="Drafters keep what they learnt from prompt to prompt, or not.")
    ] = State.carried,
    engine: options.Engine = "auto",
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
    check_target(out)
    from paceline.lm import LM
    from paceline.measuring import report
    from paceline.measuring.bench import bench as run
    from paceline.measuring.prompts import read_prompts
    from paceline.measuring.turns import Asking

    dialogues = read_prompts(prompts, limit)
    methods, left_out = options.find_drafters(drafters)
    lm = LM(model, engine=engine, drafter="plain", threads=threads, device=device)
    asking = Asking(max_new_tokens, temperature, seed, chat, ignore_eos=True)
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    carried = state is State.carried
    with counting(turns * (repeat + 1)) as tick:
        result = run(lm, methods, dialogues, asking, nodes, repeat, carried, tick)
    found = {
        "schema": "paceline-bench/1",
        **report.conditions(lm, model),
        "settings": {
            "file": str(prompts),
            "lines": len(dialogues),
            "turns": turns,
            "repeat": repeat,
            "budgets": nodes,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "chat": chat,
            "ignore_eos": True,
            "state": state.value,
        },
        "left_out": left_out,
        **report.bench_document(result),
    }
    show(report.bench_tables(found), stdout=not json)
    for name in left_out:
        say(f"left out {name}: it needs something; name it with its settings")
    if found["clipped"]:
        say(f"{found['clipped']} of {turns} prompts were clipped to fit the context")
    different = sum(arm["different"] for arm in found["arms"])
    if different:
        say(f"{different} outputs differ from plain decoding; `paceline prove` says where and why")
    if out:
        save(out, found)
    if json:
        document(found)
    if different and lm.engine.invariant:
        raise typer.Exit(1)
