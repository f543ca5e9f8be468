"""Messages as chat templates expect them, whatever client wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paceline.errors import RequestError

Message = Mapping[str, Any]


def as_templates_expect(
    messages: Iterable[Message], has_developer_role: bool = False
) -> list[dict[str, Any]]:
    """Return messages without content that is null, and with the arguments of calls as objects.

    Templates serialise arguments themselves, as `transformers` documents; text that is no JSON
    object stays text.

    Args:
        messages: of a conversation.
        has_developer_role: whether the template knows the role `developer`; otherwise it is
            `system`, its earlier name.
    """
    expected = [_expected(message) for message in messages]
    if not has_developer_role:
        for message in expected:
            if message.get("role") == "developer":
                message["role"] = "system"
    return expected


def with_content(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return messages that all have content, empty where there was none."""
    return [{"content": "", **message} for message in messages]


def calls_as_text(messages: Iterable[Message], has_tool_role: bool) -> list[dict[str, Any]]:
    """Return messages for a template that knows no calls: calls and their results as text.

    Args:
        messages: of a conversation.
        has_tool_role: whether the template knows the role `tool`; otherwise results come from the
            user.
    """
    told = []
    for message in messages:
        fields = dict(message)
        calls = fields.pop("tool_calls", None)
        if calls:
            texts = [fields.get("content") or "", *map(_call_text, calls)]
            fields["content"] = "\n".join(text for text in texts if text)
        if fields.get("role") == "tool" and not has_tool_role:
            fields["role"] = "user"
        told.append(fields)
    return told


def _expected(message: Message) -> dict[str, Any]:
    fields = {name: value for name, value in message.items() if name != "content"}
    if message.get("content") is not None:
        fields["content"] = message["content"]
    calls = fields.get("tool_calls")
    if isinstance(calls, list):
        fields["tool_calls"] = [_with_arguments(call) for call in calls]
    return fields


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str) or not isinstance(function, Mapping):
        return call
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": value}} if type(value) is dict else call


def _call_text(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if isinstance(function, Mapping):
        named = ("name", "arguments")
        function = {name: function[name] for name in named if name in function}
    return json.dumps(function, ensure_ascii=False)


_END = "[the message goes on here] "  # with a space, by which a template that trims is known


def to_continue(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages whose last one ends with a mark.

    Raises:
        RequestError: the last message has no text.
    """
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str) or not content:
        raise RequestError("continue_final_message needs a last message with text")
    return [*messages[:-1], {**messages[-1], "content": content + _END}]


def up_to_end(text: str) -> str:
    """Return a rendered text up to the mark; trimmed where the template trims messages.

    Raises:
        RequestError: the template leaves the last message out.
    """
    start = text.rfind(_END.strip())
    if start < 0:
        raise RequestError("the chat template leaves out the last message, so nothing continues it")
    return text[:start] if text[start:].startswith(_END) else text[:start].rstrip()
