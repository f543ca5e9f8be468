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

    A schema beside tools describes the text that is written instead of calls.

    Raises:
        RequestError: there are tools and also a grammar of rules; or as `Grammar` and `style_of`.
    """
    grammars = [Grammar.schema(schema)] if schema is not None else []
    if grammar is not None:
        grammars.append(Grammar(grammar, "lark") if isinstance(grammar, str) else grammar)
    value_parser = _schema_parser(schema) if any(each.kind == "json" for each in grammars) else None
    if tools is None:
        return grammars, value_parser
    text = grammars[0].term() if len(grammars) == 1 else None
    if grammars and text is None:
        check({Side.TOOLS: "tools", Side.RULES: "a grammar of rules"})
    style = style_of(template.source if template else "")
    calls = tools.grammar(style, text)
    return [calls] if calls else [], _calls_or_value(tools.parser(), value_parser)


def _calls_or_value(calls: Parser, value: Parser | None) -> Parser:
    """Return a parser of tool calls, and of a schema's value where there are none."""
    if value is None:
        return calls

    def parse(text: str) -> Parsed:
        parsed = calls(text)
        return parsed if parsed.tool_calls else parsed._replace(value=value(text).value)

    return Parser(parse, calls.scanner)


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
