"""Tool calls: functions offered to a model, the grammar of their calls, and calls in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.control.grammar import Grammar, embedded
from paceline.core import Parsed, Parser
from paceline.errors import RequestError, unknown
from paceline.models.tokenizer import Tokenizer

Choice = str | Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST = 128  # tools of a request
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to have called."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How a family of models writes calls.

    Attributes:
        marker: what its chat template holds, and the others' do not.
        begin: before the JSON of a call.
        end: after it.
        arguments: key of the arguments.
        many: whether there may be several calls, one after the other.
    """

    marker: str
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    many: bool = False


PLAIN = Style("")
STYLES = {  # the first whose marker the template holds; else PLAIN
    "hermes": Style("<tool_call>", "<tool_call>\n", "\n</tool_call>", many=True),  # Qwen2.5, Qwen3
    "llama": Style('"parameters":', arguments="parameters"),  # Llama 3.1 and 3.2
}
# Calls that are no JSON, or marked by tokens without text.
_OTHERS = ("<function=", "[TOOL_CALLS]", "<\uff5ctool", "<|channel|>", "```tool_code")

_TOLD = """You can call these functions:
{tools}
To call one, answer with JSON alone: {{"name": NAME, "arguments": {{...}}}}"""


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        functions: JSON schema of the arguments by name.
        given: as templates expect them.
        choice: `auto` (text or calls, as the model likes), `required` (calls), or a tool's name
            (one call of it).
    """

    functions: Mapping[str, Mapping[str, Any]]
    given: tuple[dict[str, Any], ...]
    choice: str

    @classmethod
    def of(cls, tools: object, choice: object = "auto") -> Tools | None:
        """From what OpenAI's API takes; None where no tool may be called.

        Args:
            tools: each `{"type": "function", "function": {"name", "description", "parameters"}}`,
                or what is in `function` alone.
            choice: `auto`, `none`, `required`, a name, or
                `{"type": "function", "function": {"name": NAME}}`.

        Raises:
            RequestError: says which tool is wrong, or that the choice is none of them.
        """
        if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
            raise RequestError("the tools are no list of functions")
        if not 0 < len(tools) <= _MOST:
            raise RequestError(f"there are {len(tools)} tools, expected 1 to {_MOST}")
        functions: dict[str, Mapping[str, Any]] = {}
        given = []
        for place, tool in enumerate(tools, 1):
            function = _function(tool, f"tool {place}")
            if function["name"] in functions:
                raise RequestError(f"two tools are called {function['name']}; rename one")
            functions[function["name"]] = function["parameters"]
            given.append({"type": "function", "function": function})
        wanted = _wanted(choice)
        if wanted == "none":
            return None
        if wanted not in ("auto", "required", *functions):
            raise RequestError(unknown("tool", wanted, ["auto", "none", "required", *functions]))
        return cls(functions, tuple(given), wanted)

    def encode(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
        """Token ids of a conversation that offers them.

        Raises:
            RequestError: as `Tokenizer.encode_chat`.
        """
        template = tokenizer.template
        if template is not None and template.takes_tools:
            return tokenizer.encode_chat(messages, self.given)
        return tokenizer.encode_chat(self.with_tools(messages))

    def with_tools(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`messages` with the tools in words, for a template that takes none."""
        tools = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in self.given)
        words = _TOLD.format(tools=tools)
        if messages and messages[0].get("role") == "system":
            first, *rest = messages
            return [{**first, "content": f"{first.get('content')}\n\n{words}"}, *rest]
        return [{"role": "system", "content": words}, *messages]

    def grammar(self, style: Style) -> Grammar | None:
        """What an output follows that has to call; None where it need not."""
        if self.choice == "auto":
            return None
        named = self.choice != "required"
        functions = {self.choice: self.functions[self.choice]} if named else self.functions
        more = "" if named or not style.many else ' ("\\n" call)*'
        rules = [
            f"start: call{more}",
            f"call: {' | '.join(f'f{i}' for i in range(len(functions)))}",
        ]
        for i, (name, parameters) in enumerate(functions.items()):
            head = f'{style.begin}{{"name": {json.dumps(name)}, "{style.arguments}": '
            value = embedded(parameters)
            rules.append(f"f{i}: {json.dumps(head)} {value} {json.dumps('}' + style.end)}")
        return Grammar("\n".join(rules), "lark")

    def parser(self, style: Style) -> Parser:
        """Return a parser that finds calls of known tools in a text."""

        def parse(text: str) -> Parsed:
            return Parsed(None, self._calls(text, style))

        return parse

    def _calls(self, text: str, style: Style) -> list[ToolCall]:
        if style.begin:
            begin, end = style.begin.strip(), style.end.strip()
            texts = re.findall(f"{re.escape(begin)}(.*?){re.escape(end)}", text, re.DOTALL)
            return [call for found in texts if (call := self._call(_json(found)))]
        found = [self._call(value) for value in _values(text)]
        return [call for call in found if call] if all(found) else []

    def _call(self, value: object) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if value.get("name") not in self.functions or not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], arguments)


def style_of(template: str) -> Style:
    """How the model of a chat template writes calls; PLAIN where nothing says so, or `""`.

    Raises:
        RequestError: in a way that is not known.
    """
    other = next((marker for marker in _OTHERS if marker in template), None)
    if other is not None and "tools" in template:
        raise RequestError(
            f"the chat template writes calls of tools with {other}, expected JSON as Hermes, Qwen "
            "and Llama 3 write it; leave the tools out"
        )
    return next((style for style in STYLES.values() if style.marker in template), PLAIN)


def _function(tool: object, where: str) -> dict[str, Any]:
    """Name, description and parameters of a tool."""
    found = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        raise RequestError(f"{where} is no function with a name")
    if not _NAME.fullmatch(found["name"]) or found["name"] in ("auto", "none", "required"):
        raise RequestError(
            f"{where} is called {found['name']!r:.80}, expected letters, digits, _, - and ., at "
            "most 64, and none of auto, none and required"
        )
    parameters = found.get("parameters")
    parameters = _NOTHING if parameters is None else parameters
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"the parameters of {found['name']} are no JSON schema of an object")
    description = found.get("description") or ""
    if not isinstance(description, str):
        raise RequestError(f"the description of {found['name']} is no text")
    return {
        "name": found["name"],
        "description": description,
        "parameters": {**parameters, "type": "object"},
    }


def _wanted(choice: object) -> str:
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, str):
        raise RequestError("tool_choice is none of auto, none, required and the name of a tool")
    return choice


def _values(text: str) -> list[object]:
    """The JSON values of which a text consists, with `;` or spaces between; none if it does not."""
    rest = text.strip().removeprefix("<|python_tag|>").lstrip()
    found: list[object] = []
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        rest = rest[end:].lstrip("; \n")
    return found


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
