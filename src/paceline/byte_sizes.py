"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(int):
    """A number of bytes, written as `2GB` or `512MiB`."""

    @classmethod
    def parse(cls, text: str) -> Size:
        """Parse a size.

        Raises:
            ValueError: it is malformed.
        """
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]i?B)?", text.strip(), re.I)
        if not found:
            raise ValueError("expected a size, e.g. 2GB or 512MiB")
        return cls(float(found[1]) * _UNITS[(found[2] or "").upper()])

    def __str__(self) -> str:
        for unit in ("GB", "MB", "KB", "GiB", "MiB", "KiB"):
            whole, rest = divmod(int(self), _UNITS[unit.upper()])
            if whole and not rest:
                return f"{whole}{unit}"
        return f"{int(self)}"
