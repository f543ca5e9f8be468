"""Checks of values that users hand in: a value of the right type, or one sentence why not."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np

from paceline.byte_sizes import Size
from paceline.errors import RequestError

_LARGEST = 1 << 63  # of integers that reach arrays


def described(value: object) -> str:
    """Return a short description of `value` for an error message."""
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < _LARGEST else "an integer of more than 64 bits"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    empty = isinstance(value, list | tuple | dict | bytes) and not value
    return f"{'an empty' if empty else article} {kind}"


def wrong(name: str, value: object, expected: str) -> RequestError:
    """Return the error of an argument `name` that is not what is `expected`."""
    return RequestError(f"{name} is {described(value)}, expected {expected}")


def check_text(name: str, value: object, expected: str = "text") -> str:
    """Return `value` if it is a string.

    Raises:
        RequestError: it is not.
    """
    if not isinstance(value, str):
        raise wrong(name, value, expected)
    return value


def check_size(name: str, value: object) -> int:
    """Return a number of bytes, given as an integer or as text such as `80MB`.

    Raises:
        RequestError: it is neither, or none.
    """
    size = value
    if isinstance(value, str):
        try:
            size = Size.parse(value)
        except ValueError:
            size = None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise wrong(name, value, "a number of bytes such as 80MB")
    return int(size)


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False.

    Raises:
        RequestError: it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise wrong(name, value, "True or False")
    return bool(value)


def check_integer(name: str, value: object, low: int = -_LARGEST, high: int = _LARGEST - 1) -> int:
    """Return `value` as an int if it is an integer from `low` to `high`.

    Raises:
        RequestError: it is not.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        raise wrong(name, value, "an integer")
    try:
        number = operator.index(value)
    except TypeError:  # an array of several
        raise wrong(name, value, "an integer") from None
    if number < low:
        raise wrong(name, number, f"at least {low}")
    if number > high:
        raise wrong(name, number, f"at most {high}")
    return int(number)


def check_number(name: str, value: object) -> float:
    """Return `value` as a float if it is a real number; NaN and infinity pass.

    Raises:
        RequestError: it is not.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise wrong(name, value, "a number") from None


def check_texts(name: str, value: object) -> tuple[str, ...]:
    """Return a string, or an iterable of strings, as a tuple of strings.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(value, str):
        return (value,)
    items = check_items(name, value, "text or a list of texts")
    return tuple(check_text(f"an item of {name}", item) for item in items)


def check_tokens(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """Return an iterable of token ids as a tuple.

    Raises:
        RequestError: an item is no integer, or outside the vocabulary of `vocab_size` tokens.
    """
    if isinstance(value, Set):  # it has no order
        raise wrong(name, value, "a list of token ids")
    items = check_items(name, value, "a list of token ids")
    tokens = [check_integer(f"a token of {name}", item) for item in items]
    outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise RequestError(f"token {outside} is outside the vocabulary of {vocab_size}")
    return tuple(tokens)


def check_items(name: str, value: object, expected: str) -> list[Any]:
    """Return the items of a list, tuple, array or other iterable; text and mappings are none.

    Raises:
        RequestError: it has no items.
    """
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise wrong(name, value, expected)
    try:
        return list(value)
    except TypeError:  # an array without an axis
        raise wrong(name, value, expected) from None


def plain_setting(name: str, value: object) -> Any:
    """Return `value` built of strings, numbers, lists and mappings only.

    Arrays become lists, and their items numbers.

    Raises:
        RequestError: it holds something else, or an integer of more than 64 bits.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        return check_integer(name, value)
    if isinstance(value, Mapping):
        pairs = value.items()
        return {plain_setting(name, key): plain_setting(name, item) for key, item in pairs}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_setting(name, item) for item in value]
    raise wrong(name, value, "a number, text, or a list of these")
