"""`paceline chat`: talk with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options, parsing
from paceline.cli.conversation.transcript import Transcript, parse_pattern, stop_strings
from paceline.cli.decode_options import LearningDraftOptions, describe
from paceline.cli.format_hint import hint_formats
from paceline.cli.output import document, say
from paceline.cli.plan_options import PlanOptions
from paceline.cli.warm_hint import hint_warm_start
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.lm import LM, RequestOptions

DEFAULT_MODEL = "smollm2-135m"

Model = Annotated[
    str | None,
    typer.Option(
        help="A name of `paceline models`, a folder or GGUF file, or a hub id; smollm2-135m by "
        "default, and the embedded story model with --template."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="For a checkpoint without a chat template: a turn with {user} in it, e.g. "
        "'User: {user}\\nBot:'; \\n is a new line."
    ),
]
System = Annotated[str | None, typer.Option(help="The system prompt: what the model is to be.")]
Plain = Annotated[bool, typer.Option("--plain", help="Show answers as they are, not as Markdown.")]
History = Annotated[
    bool,
    typer.Option(help="Keep what is typed in the cache folder, for the arrow keys of later talks."),
]


def chat(
    context: typer.Context,
    model: Model = None,
    template: Template = None,
    system: System = None,
    plain: Plain = False,
    history: History = True,
    *,
    sampling: options.SamplingOptions,
    constraints: options.ConstraintOptions,
    drafting: LearningDraftOptions,
    engine: options.EngineOptions,
    plan: PlanOptions,
    prefixes: options.PrefixCacheOptions,
    json: options.Json = False,
) -> None:
    """Talk with a model. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends the talk.

    A terminal has line editing, history and pastes of several lines as one message with
    `pip install 'paceline[chat]'`; otherwise each line of the input is a message.
    """
    from paceline.cli.conversation.banner import banner
    from paceline.cli.conversation.reader import reader_for
    from paceline.cli.conversation.talk import Talk

    requested: RequestOptions = {**sampling.request_options(), **constraints.request_options()}
    pattern = parse_pattern(template)
    requested["stop"] = [*parsing.stops(sampling.stop), *stop_strings(pattern)]
    if model is None and pattern is None and plan.plan is None:
        model = DEFAULT_MODEL
    model, engine, drafting = plan.apply(context, model, engine, drafting)
    lm = drafting.open(engine, model)
    prefixes.open(lm)
    if pattern is None:
        _try_template(lm)
    reader = reader_for(history)
    talk = Talk(lm, Transcript(pattern, system or None), requested, reader, not plain, json)
    talk.check()  # refused before anyone types
    if reader.interactive:
        say(banner(lm))
        hint_formats(lm, engine.weight_format)
        hint_warm_start(lm, model)
    talk.run()
    drafting.keep(lm)
    if json:
        answers = [
            {"user": each.said, **describe(lm, each.request, each.output, drafting, sampling)}
            for each in talk.answers
        ]
        document({"turns": answers})


def _try_template(lm: LM) -> None:
    try:
        lm.tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        hint = "or say how a turn is written, e.g. --template 'User: {user}\\nBot:'"
        raise RequestError(f"{error}; {hint}") from None
