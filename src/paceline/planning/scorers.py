"""Scorers of answers, by name, for `paceline tune-sampling`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

from paceline.errors import MethodError, RequestError

Scorer = Callable[[str, str], float]  # text, expected answer -> 0 to 1
SCORERS = ("exact", "regex", "command")


def scorer(name: str, command: str = "", seconds: float = 10.0) -> Scorer:
    """Return the scorer called `name`.

    `exact`: 1 if the text is the answer, spaces around them apart. `regex`: 1 if the answer, a
    regular expression, matches somewhere in the text. `command`: the user's own program; it reads
    the text from its standard input, gets the answer as its last argument, and prints a number from
    0 to 1, or nothing: then the score is 1 if it exits with 0.

    Raises:
        MethodError: unknown name, or a command without that scorer, or the reverse.
        RequestError: a shell cannot parse the command.
    """
    if name not in SCORERS:
        raise MethodError(f"the scorer is {name!r}, expected {', '.join(SCORERS)}")
    if (name == "command") != bool(command):
        raise MethodError("--scorer command and --command belong together; give both or neither")
    if command:
        _check_syntax(command)
    if name == "exact":
        return lambda text, answer: float(text.strip() == answer.strip())
    if name == "regex":
        return _matches
    return lambda text, answer: _run_command(command, text, answer, seconds)


def _matches(text: str, answer: str) -> float:
    try:
        return float(re.search(answer, text) is not None)
    except re.error as error:
        raise RequestError(f"{answer!r} is not a regular expression: {error}") from None


def _check_syntax(command: str) -> None:
    words = ["/bin/sh", "-n", "-c", command]  # checks syntax, runs nothing
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode:
        message = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise RequestError(f"the scorer {command!r} is not a command: {message}")


def _run_command(command: str, text: str, answer: str, seconds: float) -> float:
    words = ["/bin/sh", "-c", f'{command} "$@"', "sh", answer]
    try:
        done = subprocess.run(
            words, input=text.encode(), stdout=subprocess.PIPE, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise RequestError(f"the scorer {command!r} took more than {seconds:g} s") from None
    if done.returncode in (126, 127):  # exit codes of a shell without such a program
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
            f"the scorer {command!r} printed {printed[:80]!r}, expected a number from 0 to 1"
        )
    return value
