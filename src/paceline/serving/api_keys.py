"""Who may use the server: named API keys, of which only digests are kept."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from paceline.errors import RequestError

_LEAST = 8  # characters of a key


class ApiKeys:
    """API keys by name; shown, it tells the names only.

    Args:
        lines: `NAME:KEY` each.

    Raises:
        RequestError: one is malformed or short, or a name comes twice; the key is not told.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._digests: list[tuple[str, bytes]] = []
        for place, line in enumerate(lines, 1):
            name, colon, key = (part.strip() for part in line.partition(":"))
            if not (colon and name and len(key) >= _LEAST):
                raise RequestError(
                    f"API key {place} is not NAME:KEY with a key of {_LEAST} characters or more"
                )
            if any(name == other for other, _ in self._digests):
                raise RequestError(f"there are two API keys of the name {name!r}")
            self._digests.append((name, _digest(key.encode())))

    @classmethod
    def read(cls, lines: Iterable[str], file: Path | None = None) -> ApiKeys:
        """Those of `lines` and of a file, where # begins a comment.

        Raises:
            RequestError: it cannot be read, or as said above.
        """
        found = list(lines)
        if file:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", "it is not UTF-8")
                raise RequestError(f"cannot read the API keys in {file}: {why}") from None
            rows = (line.strip() for line in text.splitlines())
            found += [row for row in rows if row and not row.startswith("#")]
            if not found:
                raise RequestError(f"{file} has no API key; give NAME:KEY in each line")
        return cls(found)

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"ApiKeys({', '.join(name for name, _ in self._digests)})"

    def name_of(self, key: bytes) -> str | None:
        """Whose key it is. All are compared, whichever it is: the time tells nothing."""
        given, found = _digest(key), None
        for name, digest in self._digests:
            if compare_digest(digest, given):
                found = name
        return found


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
