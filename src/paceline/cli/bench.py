"""`paceline bench`: speed against plain decoding on this machine."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import check_target, save_text, say, show
from paceline.cli.progress import counting
from paceline.cli.work import deliver, prepare
from paceline.errors import RequestError


class State(StrEnum):
    """What drafters know when a prompt begins."""

    carried = "carried"
    reset = "reset"
    both = "both"


def bench(
    model: options.Models,
    prompts: options.Prompts,
    drafters: options.Drafters = ["all"],  # noqa: B006
    budget: Annotated[
        str, typer.Option(help="Nodes beyond the root or auto; one or more, with commas.")
    ] = "16,auto",
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Rounds over all prompts.")] = 3,
    suite: Annotated[
        str | None, typer.Option(help="The prompts are those of a suite: spec-bench.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Only these categories, or tasks of the suite; with commas.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first N lines; of each task with --suite or --tasks."),
    ] = None,
    max_new_tokens: options.NewTokens = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    state: Annotated[
        State,
        typer.Option(help="Drafters keep what they learnt from prompt to prompt, or not; or both."),
    ] = State.carried,
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    kv_format: options.KvFormat = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    guide: options.Guide = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarFile = None,
    choice: options.Choice = None,
    chat: options.Chat = False,
    out: options.Out = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots to this file; nothing is fetched.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure drafters against plain decoding.

    Arms take turns on each prompt; each round starts from drafters that know nothing. All arms
    decode the same number of tokens, past the end of the text if need be, but to the end of what
    follows a grammar. Turns and clipped prompts are as in `paceline prove`. Exit 1 if an output
    differs that may not.
    """
    check_target(html)
    if html is not None and out is not None and html.resolve() == out.resolve():
        raise RequestError(f"--out and --html both name {out}; give two names")
    nodes = options.budgets(budget)
    follows = options.one_grammar(json_schema, regex, grammar, choice)
    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    wanted = [task.strip() for task in tasks.split(",")] if tasks is not None else []
    work = prepare(model, prompts, drafters, limit, chosen, out, suite, wanted)
    from paceline.measuring import bench as measure
    from paceline.measuring import report, tables
    from paceline.measuring.html import page
    from paceline.measuring.turns import Asking

    steered = tuple(guide or ())
    asking = Asking(max_new_tokens, temperature, seed, chat, follows is None, follows, steered)
    states = [name for name in measure.STATES if state in (name, "both")]
    with counting(work.turns * (repeat + 1)) as tick:
        result = measure.bench(
            work.lm, work.methods, work.dialogues, asking, nodes, repeat, states, tick
        )
    found = {
        "schema": "paceline-bench/1",
        **report.conditions(work.lm, model),
        "settings": {
            "file": str(prompts),
            "suite": suite,
            "tasks": list(dict.fromkeys(dialogue.category for dialogue in work.dialogues)),
            "lines": len(work.dialogues),
            "turns": work.turns,
            "repeat": repeat,
            "budgets": nodes,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "chat": chat,
            "guide": guide or [],
            "ignore_eos": asking.ignore_eos,
            "grammar": follows and asdict(follows),
            "state": state.value,
        },
        "left_out": work.left_out,
        **report.bench_document(result),
    }
    show(tables.bench_tables(found), stdout=not json)
    work.tell(found["clipped"], work.turns)
    lossy = options.lossy(work.methods)
    for name in lossy:
        say(f"{name} is lossy: its outputs may differ from plain decoding's")
    arms = zip(result.arms, found["arms"], strict=True)
    different = sum(counts["different"] for arm, counts in arms if arm.spec not in lossy)
    if different:
        say(f"{different} outputs differ from plain decoding; `paceline prove` says where and why")
    if html:
        save_text(html, page(found))
    deliver(found, out, json)
    if different and work.lm.engine.invariant:
        raise typer.Exit(1)
