"""Judges of answers, by name: what `paceline tune-sampling` ranks settings by."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

from paceline.errors import MethodError, RequestError

Scorer = Callable[[str, str], float]  # text, expected answer -> 0 to 1
SCORERS = ("exact", "regex", "command")


def scorer(name: str, command: str = "", seconds: float = 10.0) -> Scorer:
    """The scorer called `name`.

    `exact`: 1 if the text is the answer, spaces around them apart. `regex`: 1 if the answer, a
    regular expression, is found in the text. `command`: the user's own program judges; it reads
    the text from its input, gets the answer as its last argument, and prints a number of 0 to 1,
    or nothing: then 1 if it exits with 0.

    Raises:
        MethodError: unknown name, or a command too many or too few.
        RequestError: a shell cannot read the command.
    """
    if name not in SCORERS:
        raise MethodError(f"the scorer is {name!r}, expected {', '.join(SCORERS)}")
    if (name == "command") != bool(command):
        raise MethodError("--scorer command and --command belong together; give both or neither")
    if command:
        _read_by_shell(command)
    if name == "exact":
        return lambda text, answer: float(text.strip() == answer.strip())
    if name == "regex":
        return _found
    return lambda text, answer: _told(command, text, answer, seconds)


def _found(text: str, answer: str) -> float:
    try:
        return float(re.search(answer, text) is not None)
    except re.error as error:
        raise RequestError(f"{answer!r} is no regular expression: {error}") from None


def _read_by_shell(command: str) -> None:
    words = ["/bin/sh", "-n", "-c", command]  # which runs nothing
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise RequestError(f"the scorer {command!r} is no command: {said}")


def _told(command: str, text: str, answer: str, seconds: float) -> float:
    words = ["/bin/sh", "-c", f'{command} "$@"', "sh", answer]
    try:
        done = subprocess.run(
            words, input=text.encode(), stdout=subprocess.PIPE, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise RequestError(f"the scorer {command!r} took more than {seconds:g} s") from None
    if done.returncode in (126, 127):  # as a shell says that there is no such program
        raise RequestError(f"the scorer {command!r} cannot be run; name a program that can")
    printed = done.stdout.decode("utf-8", "replace").strip()
    if not printed:
        return float(done.returncode == 0)
    try:
        value = float(printed)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RequestError(
            f"the scorer {command!r} printed {printed[:80]!r}, expected a number of 0 to 1"
        )
    return value
