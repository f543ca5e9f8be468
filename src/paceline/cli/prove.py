"""`paceline prove`: every output against plain decoding, token by token."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, save, say, show
from paceline.cli.progress import counting


def prove(
    model: options.Model,
    prompts: options.Prompts,
    drafters: options.Drafters = ["all"],  # noqa: B006
    temperatures: Annotated[str, typer.Option(help="Separated by commas.")] = "0,0.7,1.0",
    limit: options.Limit = None,
    max_new_tokens: options.NewTokens = 64,
    budget: options.Budget = 16,
    engine: options.Engine = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    chat: options.Chat = False,
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Prove that no drafter changes a token; exit 1 if one does.

    Each turn of a line is a prompt whose context is the earlier turns and plain decoding's answers.
    Prompts that do not fit the context keep their last tokens and are counted as clipped.
    Drafters keep what they learnt from prompt to prompt.
    """
    heats = options.numbers("--temperatures", temperatures)
    check_target(out)
    from paceline.lm import LM
    from paceline.measuring import report
    from paceline.measuring.prompts import read_prompts
    from paceline.measuring.proof import prove as run
    from paceline.measuring.turns import Asking

    dialogues = read_prompts(prompts, limit)
    methods, left_out = options.find_drafters(drafters)
    lm = LM(model, engine=engine, drafter="plain", threads=threads, device=device)
    asking = Asking(max_new_tokens, seed=seed, chat=chat)
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    with counting(turns * len(heats)) as tick:
        proof = run(lm, methods, dialogues, heats, asking, budget, tick)
    found = {
        **report.proof_document(proof),
        "state": "carried",
        "left_out": left_out,
        "settings": {
            "file": str(prompts),
            "lines": len(dialogues),
            "turns": turns,
            "temperatures": heats,
            "max_new_tokens": max_new_tokens,
            "budget": budget,
            "seed": seed,
            "chat": chat,
        },
        **report.conditions(lm, model),
    }
    show(report.proof_table(proof), stdout=not json)
    for finding in proof.findings[:10]:
        say(str(finding))
    for name in left_out:
        say(f"left out {name}: it needs something; name it with its settings")
    if proof.clipped:
        say(f"{proof.clipped} of {proof.prompts} prompts were clipped to fit the context")
    say(
        f"{found['pairs']} pairs: {found['identical']} identical, {found['ties']} ties, "
        f"{found['bugs']} bugs; drafters carried over what they learnt"
    )
    if out:
        save(out, found)
    if json:
        document(found)
    if found["bugs"]:
        raise typer.Exit(1)
