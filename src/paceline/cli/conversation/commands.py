"""Commands that are typed in a chat: `/help`, `/save FILE` and the like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paceline.errors import RequestError, unknown

COMMANDS = {
    "help": ("", "list the commands"),
    "system": ("[TEXT|off]", "show, set or remove the system prompt"),
    "settings": ("[NAME=VALUE ...]", "show or change temperature, top_p, max_new_tokens, ..."),
    "retry": ("", "answer the last message again, with another seed"),
    "clear": ("", "forget what was said; the system prompt stays"),
    "save": ("FILE", "write the conversation to a JSON file"),
    "load": ("FILE", "continue a conversation that was saved"),
    "stats": ("", "show tokens, speed and how full the context is"),
    "exit": ("", "end the talk; so does Ctrl-D"),
}
_ALIASES = {"quit": "exit", "bye": "exit", "?": "help", "set": "settings", "reset": "clear"}
_WITHOUT_ARGUMENT = [name for name, (argument, _) in COMMANDS.items() if not argument]
_FIRST_WORD = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command and what stands after its name.

    Attributes:
        name: one of `COMMANDS`.
        argument: the rest, without blanks around it.
    """

    name: str
    argument: str = ""


def parse_line(text: str) -> Command | str:
    """Return the command that a text is, or the message.

    A command is `/` and a word of letters at the beginning, so that a path such as `/etc/hosts` is
    a message; `//word` is the message `/word`.

    Raises:
        RequestError: there is no such command, or it takes no argument.
    """
    line = text.strip()
    if line.startswith("//"):
        return line[1:]
    match = _FIRST_WORD.fullmatch(line)
    if match is None:
        return line
    name = _ALIASES.get(match[1].lower(), match[1].lower())
    argument = (match[2] or "").strip()
    if name not in COMMANDS:
        raise RequestError(
            f"{unknown('command', '/' + name[:40], ['/' + each for each in COMMANDS])} "
            "/help lists them, and // begins a message with /"
        )
    if argument and name in _WITHOUT_ARGUMENT:
        raise RequestError(f"/{name} takes nothing after it, and {argument[:40]!r} is there")
    return Command(name, argument)


def help_text() -> str:
    """Return the commands, a line each."""
    rows = [(f"/{name} {argument}".rstrip(), about) for name, (argument, about) in COMMANDS.items()]
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {about}" for left, about in rows)


_NUMBERS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "seed": int,
}
SETTINGS = tuple(_NUMBERS)


def parse_settings(text: str) -> dict[str, int | float | None]:
    """Return the settings of `NAME=VALUE NAME=VALUE`; None takes the default again.

    Raises:
        RequestError: a name is unknown or given twice, or a value is no number.
    """
    found: dict[str, int | float | None] = {}
    for item in re.split(r"[\s,]+", text.strip()):
        name, equals, value = item.partition("=")
        name = name.replace("-", "_")
        if name not in _NUMBERS:
            raise RequestError(unknown("setting", name[:40], SETTINGS))
        if name in found:
            raise RequestError(f"{name} is given twice; give it once")
        if not equals or not value:
            raise RequestError(f"{name} has no value; write {name}=NUMBER, or {name}=default")
        if value == "default":
            found[name] = None
            continue
        try:
            found[name] = _NUMBERS[name](value)
        except (ValueError, OverflowError):
            kind = "a whole number" if _NUMBERS[name] is int else "a number"
            raise RequestError(f"{name} is {value[:40]!r}, expected {kind}") from None
    return found
