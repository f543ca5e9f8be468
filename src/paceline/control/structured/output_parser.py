"""What an output follows, and what it says beyond its text: the value of a schema, calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from paceline.control.grammar import Grammar
from paceline.control.structured.tools import Tools, style_of
from paceline.core import Parsed, Parser
from paceline.errors import RequestError
from paceline.models.chat import ChatTemplate


def followed(
    schema: object,
    grammar: Grammar | str | None,
    tools: Tools | None,
    template: ChatTemplate | None,
) -> tuple[list[Grammar], Parser | None]:
    """What an output follows, and how it is read.

    Raises:
        RequestError: a schema or grammar beside tools; else as `Grammar` and `style_of`.
    """
    found = [Grammar.schema(schema)] if schema is not None else []
    if grammar is not None:
        found.append(Grammar(grammar, "lark") if isinstance(grammar, str) else grammar)
    if tools is None:
        json_ = any(each.kind == "json" for each in found)
        return found, _of_schema(schema) if json_ else None
    if found:
        raise RequestError(
            "there are tools beside a schema or grammar, and an output follows one of them; "
            "leave one out, or say tool_choice none"
        )
    style = style_of(template.source if template else "")
    calls = tools.grammar(style)
    return [calls] if calls else [], tools.parser(style)


def _of_schema(schema: object) -> Parser:
    """Reads the object of a pydantic model, or else what JSON says; None where it is cut short.

    A model may check more than its schema says: reading raises a RequestError where it refuses.
    """
    make = getattr(schema, "model_validate", None)

    def parse(text: str) -> Parsed:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return Parsed(None, [])
        return Parsed(_made(make, value) if callable(make) else value, [])

    return parse


def _made(make: Callable[[object], Any], value: object) -> Any:
    try:
        return make(value)
    except ValueError as error:  # pydantic's ValidationError is one
        lines = " ".join(str(error).split())
        raise RequestError(f"the model refuses what its schema allows: {lines:.200}") from None
