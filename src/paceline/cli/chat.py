"""`paceline chat`: talk with a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options, parsing
from paceline.cli.decode_options import LearningDraftOptions, describe, stream, summary
from paceline.cli.output import document, say
from paceline.errors import RequestError

if TYPE_CHECKING:
    from paceline.lm import LM, Prompt, RequestOptions

USER = "{user}"
Template = Annotated[
    str | None,
    typer.Option(
        help="For a checkpoint without a chat template: a turn with {user} in it, e.g. "
        "'User: {user}\\nBot:'; \\n is a new line."
    ),
]


def chat(
    model: options.ModelOption = None,
    template: Template = None,
    *,
    sampling: options.SamplingOptions,
    constraints: options.ConstraintOptions,
    drafting: LearningDraftOptions,
    engine: options.EngineOptions,
    prefixes: options.PrefixCacheOptions,
    json: options.Json = False,
) -> None:
    """Talk with a model, a line at a time. /exit or Ctrl-D ends, Ctrl-C stops an answer."""
    requested: RequestOptions = {**sampling.request_options(), **constraints.request_options()}
    pattern = _pattern(template)
    requested["stop"] = [*parsing.stops(sampling.stop), *_ends(pattern)]
    lm = drafting.open(engine, model)
    prefixes.open(lm)
    if pattern is None:
        _try_template(lm)
    lm.stream(lm.request(_prompt(pattern, [], "Hello"), **requested))  # refused before anyone types
    talk: list[tuple[str, str]] = []
    answers: list[dict[str, Any]] = []
    while (said := _listen()) is not None:
        requested["seed"] = sampling.seed + len(answers)
        prompt = _fit(lm, pattern, talk, said, sampling.max_new_tokens)
        request = lm.request(prompt, **requested)
        output = stream(lm, request, quiet=json)
        say(summary(output))
        talk.append((said, output.text.strip()))
        answers.append({"user": said, **describe(lm, request, output, drafting, sampling)})
    drafting.keep(lm)
    if json:
        document({"turns": answers})


def _try_template(lm: LM) -> None:
    try:
        lm.tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        hint = "or say how a turn is written, e.g. --template 'User: {user}\\nBot:'"
        raise RequestError(f"{error}; {hint}") from None


def _pattern(template: str | None) -> str | None:
    if template is None:
        return None
    pattern = template.replace("\\n", "\n")
    if USER not in pattern:
        raise RequestError(f"--template is {template!r}, expected {USER} in it")
    return pattern


def _ends(pattern: str | None) -> list[str]:
    """Return stop strings: a model that writes the user's next line has ended its turn."""
    start = pattern.partition(USER)[0].strip() if pattern else ""
    return [f"\n{start}"] if start else []


def _listen() -> str | None:
    """Return the next line that is not blank, or None at the end."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise RequestError("the input is not UTF-8 text") from None
        if not line or line.strip() == "/exit":
            return None
        if line.strip():
            return line.strip()


def _fit(lm: LM, pattern: str | None, talk: list[tuple[str, str]], said: str, room: int) -> Prompt:
    """Return the conversation with the new line, without its oldest turns if it is too long.

    At most half of a small context is kept free for the answer.
    """
    context = lm.engine.config.context
    room = min(room, context // 2)
    while True:
        prompt = _prompt(pattern, talk, said)
        size = len(lm.request(prompt).prompt)
        if not talk or size + room <= context:
            return prompt
        talk.pop(0)
        say("the oldest turn was dropped to fit the context")


def _prompt(pattern: str | None, talk: list[tuple[str, str]], said: str) -> Prompt:
    if pattern:
        past = "".join(f"{pattern.replace(USER, user)} {answer}\n" for user, answer in talk)
        return past + pattern.replace(USER, said)
    messages = []
    for user, answer in talk:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": said}]
