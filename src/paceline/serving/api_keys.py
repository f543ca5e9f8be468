"""Named API keys; only their digests are kept in memory."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from paceline.errors import RequestError

_MIN_CHARACTERS = 8


class ApiKeys:
    """API keys by name; `repr` shows the names only.

    Args:
        lines: `NAME:KEY` each.

    Raises:
        RequestError: a line is malformed, a key is shorter than 8 characters, or a name is given
            twice. The message never contains a key.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._digests: list[tuple[str, bytes]] = []
        for number, line in enumerate(lines, 1):
            name, colon, key = (part.strip() for part in line.partition(":"))
            if not (colon and name and len(key) >= _MIN_CHARACTERS):
                raise RequestError(
                    f"API key {number} is not NAME:KEY with a key of {_MIN_CHARACTERS} or more "
                    "characters"
                )
            if any(name == other for other, _ in self._digests):
                raise RequestError(f"two API keys are called {name!r}; rename one")
            self._digests.append((name, _digest(key.encode())))

    @classmethod
    def read(cls, lines: Iterable[str], file: Path | None = None) -> ApiKeys:
        """Read the keys in `lines` and those in a file, in which # starts a comment line.

        Raises:
            RequestError: the file cannot be read or has no key, or a key is refused (see the
                class).
        """
        rows = list(lines)
        if file:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", "it is not UTF-8")
                raise RequestError(f"cannot read the API keys in {file}: {why}") from None
            in_file = (line.strip() for line in text.splitlines())
            rows += [row for row in in_file if row and not row.startswith("#")]
            if not rows:
                raise RequestError(f"{file} contains no API key; put NAME:KEY in each line")
        return cls(rows)

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"ApiKeys({', '.join(name for name, _ in self._digests)})"

    def name_of(self, key: bytes) -> str | None:
        """Return the name of a key, None if it is unknown.

        Compares with every known key, so that the time taken reveals nothing.
        """
        given, match = _digest(key), None
        for name, digest in self._digests:
            if compare_digest(digest, given):
                match = name
        return match


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
