"""Grammars that an output must follow, and parsers of its value or tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from paceline.compatibility import Side, check
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
    """Return the grammars that an output follows, and the parser of its text.

    Raises:
        RequestError: there are tools and also a schema or grammar; or as `Grammar` and `style_of`.
    """
    grammars = [Grammar.schema(schema)] if schema is not None else []
    if grammar is not None:
        grammars.append(Grammar(grammar, "lark") if isinstance(grammar, str) else grammar)
    if tools is None:
        json_ = any(each.kind == "json" for each in grammars)
        return grammars, _schema_parser(schema) if json_ else None
    if grammars:
        check({Side.TOOLS: "tools", Side.GRAMMAR: "a schema or grammar"})
    style = style_of(template.source if template else "")
    calls = tools.grammar(style)
    return [calls] if calls else [], tools.parser()


def _schema_parser(schema: object) -> Parser:
    """Return a parser that makes an object of a pydantic model, or else the JSON value.

    Text that was cut short gives None. A model may check more than its schema expresses: the parser
    raises a RequestError if it rejects the value.
    """
    make = getattr(schema, "model_validate", None)

    def parse(text: str) -> Parsed:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return Parsed(None, [])
        return Parsed(_made(make, value) if callable(make) else value, [])

    return Parser(parse)


def _made(make: Callable[[object], Any], value: object) -> Any:
    try:
        return make(value)
    except ValueError as error:  # pydantic's ValidationError is one
        lines = " ".join(str(error).split())
        raise RequestError(
            f"the pydantic model rejects a value that its schema allows: {lines:.200}"
        ) from None
