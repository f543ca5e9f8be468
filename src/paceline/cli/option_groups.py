"""Groups of options: a frozen dataclass declares them once, a verb takes it as one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_type_hints

import typer

from paceline.cli.files import looks_like_path, names_model
from paceline.cli.output import say
from paceline.errors import RequestError

Verb = Callable[..., None]


def spread(verb: Verb) -> Verb:
    """Return the verb as typer reads it: each group replaced by one option for every field.

    A parameter whose annotation is a dataclass is a group. Its fields are annotated as a verb's
    own options are, and the first line of its docstring is the title of their panel in `--help`.
    """
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, type[Any]] = {}
    options: list[Parameter] = []
    for name, parameter in signature(verb).parameters.items():
        kind = hints.get(name)
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
            options += _options(kind)
        else:
            options.append(parameter.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY))
    if not groups:
        return verb

    @wraps(verb)
    def gathered(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        verb(**given)

    setattr(gathered, "__signature__", Signature(options))  # noqa: B010
    gathered.__annotations__ = {option.name: option.annotation for option in options}
    return gathered


def either_model(verb: Verb) -> Verb:
    """Let a verb with a parameter `model` take it as its last argument or as `--model`.

    A verb whose `model` has no default needs one of them.
    """
    given = signature(verb)
    model = given.parameters["model"]
    required = model.default is Parameter.empty
    (_, option) = get_args(model.annotation)
    help_ = option.help
    by_position = Annotated[str | None, typer.Argument(metavar="MODEL", help=help_)]
    by_name = Annotated[str | None, typer.Option("--model", help="The same as MODEL.")]
    keyword = Parameter.KEYWORD_ONLY
    parameters = [
        each.replace(annotation=by_name, default=None) if each.name == "model" else each
        for each in given.parameters.values()
    ]
    parameters.append(Parameter("positional", keyword, default=None, annotation=by_position))

    @wraps(verb)
    def chosen(positional: str | None = None, **options: Any) -> None:
        named = options.pop("model", None)
        if None not in (positional, named) and positional != named:
            raise RequestError(f"the model is {positional!r} and --model {named!r}; give one")
        value = positional if named is None else named
        if required and value is None:
            raise RequestError(
                "no model is named; give MODEL, e.g. smollm2-135m, a folder or a GGUF file"
            )
        verb(**options, model=value)

    setattr(chosen, "__signature__", Signature(parameters))  # noqa: B010
    chosen.__annotations__ = {each.name: each.annotation for each in parameters}
    return chosen


def model_or_prompt(verb: Verb) -> Verb:
    """Let a verb with the parameters `prompt` and `model` take `[MODEL] [PROMPT]`.

    One word is the prompt, two are the model and the prompt; `--model` names the model as well.
    """
    given = signature(verb)
    help_ = (
        "The text to continue; - reads it from stdin. Before it, as an argument of its own, may "
        "stand the model."
    )
    words = Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [PROMPT]", help=help_)]
    parameters = [
        each.replace(annotation=words, name="words") if each.name == "prompt" else each
        for each in given.parameters.values()
    ]

    @wraps(verb)
    def chosen(words: list[str] | None = None, **options: Any) -> None:
        model, prompt = split_prompt(words or [], options.pop("model", None))
        if model is None and prompt is not None and looks_like_path(prompt):
            say(f"{prompt!r:.80} is taken for the prompt; a model stands before it, or in --model")
        verb(**options, model=model, prompt=prompt)

    setattr(chosen, "__signature__", Signature(parameters))  # noqa: B010
    chosen.__annotations__ = {each.name: each.annotation for each in parameters}
    return chosen


def split_prompt(words: Sequence[str], model: str | None) -> tuple[str | None, str | None]:
    """Return the model and the prompt that the arguments of a verb name.

    Args:
        words: the arguments.
        model: value of `--model`.

    Raises:
        RequestError: it is not plain which argument is what.
    """
    if len(words) > 2 or (len(words) == 2 and model is not None):
        raise RequestError(
            f"{' '.join(words)!r:.80} is {len(words)} arguments, expected one prompt; put it in "
            "quotes"
        )
    if len(words) == 2:
        if not names_model(words[0], before_prompt=True):
            raise RequestError(
                f"{words[0]!r:.80} before {words[1]!r:.80} is no model, and one prompt is "
                "expected; put it in quotes"
            )
        return words[0], words[1]
    if words and model is None and names_model(words[0]):
        raise RequestError(
            f"{words[0]!r:.80} is a model, and no prompt is given; add one in quotes after it, or "
            "name the model with --model to begin a story"
        )
    return model, words[0] if words else None


def _options(group: type[Any]) -> Iterator[Parameter]:
    title = (group.__doc__ or "").partition("\n")[0].removesuffix(".")
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, option = get_args(hints[field.name])
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_titled(kind, option, title),
        )


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default


def _titled(kind: Any, option: Any, title: str) -> Any:
    option = copy(option)
    option.rich_help_panel = title
    return Annotated[kind, option]
