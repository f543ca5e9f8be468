"""`paceline prove`: every output against plain decoding, token by token."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import say, show
from paceline.cli.progress import counting
from paceline.cli.work import deliver, prepare
from paceline.errors import MethodError

_SHOWN = 10  # differences on the screen; the document holds all


def prove(
    model: options.Models,
    prompts: options.Prompts,
    drafters: options.Drafters = ["all"],  # noqa: B006
    temperatures: Annotated[str, typer.Option(help="Separated by commas.")] = "0,0.7,1.0",
    limit: options.Limit = None,
    max_new_tokens: options.NewTokens = 64,
    budget: options.Budget = "16",
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    kv_format: options.KvFormat = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    guide: options.Guide = None,
    watermark: options.Watermark = None,
    walk: options.Walk = "gumbel",
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarFile = None,
    choice: options.Choice = None,
    chat: options.Chat = False,
    reload: Annotated[
        bool,
        typer.Option("--reload", help="Save and load what drafters learnt between prompts."),
    ] = False,
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Prove that no drafter changes a token; exit 1 if one does.

    Each turn of a line is a prompt whose context is the earlier turns and plain decoding's answers.
    Prompts that do not fit the context keep their last tokens and are counted as clipped.
    Drafters keep what they learnt from prompt to prompt.
    """
    if walk != "gumbel":
        raise MethodError(
            f"--walk {walk} cannot be proven by comparing tokens: the rejection walk keeps their "
            "law only, which its statistical test checks; use --walk gumbel"
        )
    for name in options.lossy(options.find_drafters(drafters)[0]):
        raise MethodError(f"{name} is lossy: its output is not plain decoding's; leave it out")
    heats = options.numbers("--temperatures", temperatures)
    mark = options.one_watermark(watermark)
    nodes = options.one_budget(budget)
    follows = options.one_grammar(json_schema, regex, grammar, choice)
    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    work = prepare(model, prompts, drafters, limit, chosen, out)
    from paceline.decoding.governor import Budget, Fixed, Governor
    from paceline.measuring import proof, report
    from paceline.measuring.costfile import known_cost
    from paceline.measuring.turns import Asking

    asking = Asking(
        max_new_tokens,
        seed=seed,
        chat=chat,
        grammar=follows,
        watermark=mark,
        guide=tuple(guide or ()),
    )

    def sizes() -> Budget:
        return Governor(known_cost(work.lm.engine)) if nodes == "auto" else Fixed(int(nodes))

    with counting(work.turns * len(heats)) as tick:
        result = proof.prove(
            work.lm, work.methods, work.dialogues, heats, asking, sizes, tick, reload
        )
    found = {
        **report.proof_document(result),
        "state": "reloaded" if reload else "carried",
        "left_out": work.left_out,
        "settings": {
            "file": str(prompts),
            "lines": len(work.dialogues),
            "turns": work.turns,
            "temperatures": heats,
            "max_new_tokens": max_new_tokens,
            "budget": nodes,
            "seed": seed,
            "chat": chat,
            "guide": guide or [],
            "grammar": follows and asdict(follows),
            "watermark": mark and mark.name,
        },
        **report.conditions(work.lm, model),
    }
    show(report.proof_table(result), stdout=not json)
    for finding in result.findings[:_SHOWN]:
        say(str(finding))
    work.tell(result.clipped, result.prompts)
    say(
        f"{found['pairs']} pairs: {found['identical']} identical, {found['ties']} ties, "
        f"{found['bugs']} bugs; drafters carried over what they learnt"
    )
    deliver(found, out, json)
    if found["bugs"]:
        raise typer.Exit(1)
