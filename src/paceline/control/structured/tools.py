"""Tools: functions offered to a model, and the grammar of their calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.control.grammar import Grammar, embedded
from paceline.control.structured.call_scanner import CallScanner
from paceline.control.structured.tool_calls import ToolCall, read_calls
from paceline.core import Parsed, Parser
from paceline.errors import RequestError, unknown
from paceline.models.tokenizer import Tokenizer

Choice = str | Mapping[str, Any]

__all__ = ["PLAIN", "STYLES", "Style", "ToolCall", "Tools", "style_of"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_TOOLS = 128
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Style:
    """The syntax in which a family of models writes calls.

    Attributes:
        marker: text that identifies the family's chat template.
        begin: text before the JSON of a call.
        end: text after it.
        arguments: key of the arguments.
        many: whether several calls may follow each other.
    """

    marker: str
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    many: bool = False


PLAIN = Style("")
STYLES = {  # the first whose marker is in the template; else PLAIN
    "hermes": Style("<tool_call>", "<tool_call>\n", "\n</tool_call>", many=True),  # Qwen2.5, Qwen3
    "llama": Style('"parameters":', arguments="parameters"),  # Llama 3.1 and 3.2
}
# Calls that are not JSON, or that are marked by tokens without text.
_OTHERS = ("<function=", "[TOOL_CALLS]", "<\uff5ctool", "<|channel|>", "```tool_code")

_INSTRUCTIONS = """You can call these functions:
{tools}
To call one, answer with JSON alone: {{"name": NAME, "arguments": {{...}}}}"""


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        functions: JSON schema of the arguments by name.
        given: the tools in the form that chat templates expect.
        choice: `auto` (the model decides), `required` (calls only), or a tool's name (one call of
            it).
    """

    functions: Mapping[str, Mapping[str, Any]]
    given: tuple[dict[str, Any], ...]
    choice: str

    @classmethod
    def of(cls, tools: object, choice: object = "auto") -> Tools | None:
        """Build it from the arguments of OpenAI's API; None if no tool may be called.

        Args:
            tools: each `{"type": "function", "function": {"name", "description", "parameters"}}`,
                or the value of `function` alone.
            choice: `auto`, `none`, `required`, a name, or
                `{"type": "function", "function": {"name": NAME}}`.

        Raises:
            RequestError: names the tool that is wrong, or a choice that does not exist.
        """
        if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
            raise RequestError("the tools are not a list of functions")
        if not 0 < len(tools) <= _MAX_TOOLS:
            raise RequestError(f"there are {len(tools)} tools, expected 1 to {_MAX_TOOLS}")
        functions: dict[str, Mapping[str, Any]] = {}
        given = []
        for number, tool in enumerate(tools, 1):
            function = _function(tool, f"tool {number}")
            if function["name"] in functions:
                raise RequestError(f"two tools are called {function['name']}; rename one")
            functions[function["name"]] = function["parameters"]
            given.append({"type": "function", "function": function})
        name = _chosen(choice)
        if name == "none":
            return None
        if name not in ("auto", "required", *functions):
            raise RequestError(unknown("tool", name, ["auto", "none", "required", *functions]))
        return cls(functions, tuple(given), name)

    def offered(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """Return the messages and tools of a conversation that offers them to a chat template.

        Tools are described in the messages where the template takes none.
        """
        template = tokenizer.template
        if template is not None and template.takes_tools:
            return messages, self.given
        return self.with_tools(messages), ()

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        settings: Mapping[str, Any] | None = None,
        split_special: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation that offers the tools.

        Raises:
            RequestError: as `Tokenizer.encode_chat`.
        """
        offered, given = self.offered(messages, tokenizer)
        return tokenizer.encode_chat(offered, given, settings, split_special)

    def with_tools(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return `messages` with the tools described in text, for templates without tools."""
        tools = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in self.given)
        words = _INSTRUCTIONS.format(tools=tools)
        if messages and messages[0].get("role") == "system":
            first, *rest = messages
            return [{**first, "content": f"{first.get('content')}\n\n{words}"}, *rest]
        return [{"role": "system", "content": words}, *messages]

    def grammar(self, style: Style, text: str | None = None) -> Grammar | None:
        """Return the grammar of an output that must consist of calls; None if it need not.

        Args:
            style: the syntax of calls.
            text: what the output may consist of instead, if no call is forced; a term of Lark.
        """
        if self.choice == "auto" and text is None:
            return None
        named = self.choice in self.functions
        functions = {self.choice: self.functions[self.choice]} if named else self.functions
        more = "" if named or not style.many else ' ("\\n" call)*'
        rules = [
            f"start: call{more}" + (f" | {text}" if self.choice == "auto" else ""),
            f"call: {' | '.join(f'f{i}' for i in range(len(functions)))}",
        ]
        for i, (name, parameters) in enumerate(functions.items()):
            head = f'{style.begin}{{"name": {json.dumps(name)}, "{style.arguments}": '
            value = embedded(parameters)
            rules.append(f"f{i}: {json.dumps(head)} {value} {json.dumps('}' + style.end)}")
        return Grammar("\n".join(rules), "lark")

    def parser(self) -> Parser:
        """Return a parser that finds calls of known tools in a text; see `tool_calls`."""

        def parse(text: str) -> Parsed:
            content, calls = read_calls(text, self.functions)
            return Parsed(None, calls, content)

        return Parser(parse, lambda: CallScanner(self.functions))


def style_of(template: str) -> Style:
    """Return the style of a chat template's model; PLAIN if the template shows none.

    Raises:
        RequestError: the template has a style that is not supported.
    """
    other = next((marker for marker in _OTHERS if marker in template), None)
    if other is not None and "tools" in template:
        raise RequestError(
            f"the chat template writes calls of tools with {other}, expected JSON as Hermes, Qwen "
            "and Llama 3 write it; leave the tools out"
        )
    return next((style for style in STYLES.values() if style.marker in template), PLAIN)


def _function(tool: object, where: str) -> dict[str, Any]:
    """Check a tool; return its name, description and parameters."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} is not a function with a name")
    if not _NAME.fullmatch(function["name"]) or function["name"] in ("auto", "none", "required"):
        raise RequestError(
            f"{where} is called {function['name']!r:.80}, expected letters, digits, _, - and ., at "
            "most 64, and none of auto, none and required"
        )
    parameters = function.get("parameters")
    parameters = _NOTHING if parameters is None else parameters
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(
            f"the parameters of {function['name']} are not a JSON schema of an object"
        )
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise RequestError(f"the description of {function['name']} is not text")
    return {
        "name": function["name"],
        "description": description,
        "parameters": {**parameters, "type": "object"},
    }


def _chosen(choice: object) -> str:
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, str):
        raise RequestError("tool_choice is none of auto, none, required and the name of a tool")
    return choice
