"""Chat templates: a checkpoint's jinja2 program that turns messages into text. Run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paceline.errors import ModelError, RequestError


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; when generating, it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: the program.
        takes_tools: whether it looks at tools.

    Raises:
        ModelError: it is not valid jinja2.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
            read = meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template is not valid jinja2: {error}") from None
        self.source = source
        self.takes_tools = "tools" in read

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of `messages`, up to where the answer begins; `tools` are offered in it.

        Raises:
            RequestError: the template refuses them.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=True,
                **special,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None


def find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template in chat_template.jinja or tokenizer_config.json; None if there is none.

    Of several named ones, `default` is taken.

    Raises:
        ModelError: it is not text, or not valid jinja2.
    """
    path = folder / "chat_template.jinja"
    try:
        found = path.read_text("utf-8") if path.exists() else settings.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
        if found is None:
            raise ModelError("none of the templates in tokenizer_config.json is called default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise ModelError("chat_template in tokenizer_config.json is not text")
    return ChatTemplate(found)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates written for transformers expect it: not escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
