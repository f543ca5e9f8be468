"""As `splice`, for the streams of `/v1/responses`: events with names and numbers, and items."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from paceline.serving.cluster.resume import SeamError

_Place = tuple[str, int]  # kind of an event, and the item of the output


class ResumedItems:
    """What a client was told of a response, and what is new in another stream of the same.

    Args:
        told: the events so far, whole, each with the blank line after it.
        ago: as for `Splice`; nothing here has a time.

    Raises:
        SeamError: it holds what is no event of a response.
    """

    def __init__(self, told: bytes, ago: Callable[[], float] = float) -> None:
        del ago
        self._begin: dict[str, Any] = {}  # names and time of the response that was told
        self._other = b""  # name of the one that goes on
        self._told: set[_Place] = set()
        self._texts: defaultdict[_Place, str] = defaultdict(str)  # told, and not met again yet
        events = [_read(event) for event in told.split(b"\n\n") if event]
        self._number = len(events)
        for event in events:
            if "response" in event:
                self._begin = {key: event["response"][key] for key in ("id", "created_at")}
            if event["type"].endswith(".delta"):
                self._texts[_place(event)] += event["delta"]
            else:
                self._told.add(_place(event))

    def rest(self, event: bytes) -> bytes:
        """An event of the other stream, less what was told; nothing where nothing is left.

        Raises:
            SeamError: it is another text, or as above.
        """
        found = _read(event)
        if self._begin and "response" in found:
            self._other = found["response"]["id"].encode()
        if self._other:  # other names begin with it
            found = _read(event.replace(self._other, self._begin["id"].encode()))
        if self._begin and "response" in found:
            found["response"] |= self._begin
        place = _place(found)
        if found["type"].endswith(".delta"):
            found["delta"] = self._new(place, found["delta"])
            if not found["delta"]:
                return b""
        else:
            self._check_end(found["type"], place)
            if place in self._told:
                return b""
        found["sequence_number"] = self._number
        self._number += 1
        said = json.dumps(found, ensure_ascii=False)
        return f"event: {found['type']}\ndata: {said}\n\n".encode()

    def _new(self, place: _Place, delta: str) -> str:
        known = self._texts[place]
        size = min(len(known), len(delta))
        if known[:size] != delta[:size]:
            raise SeamError("another replica answers otherwise")
        self._texts[place] = known[size:]
        return delta[size:]

    def _check_end(self, kind: str, place: _Place) -> None:
        """What ends an item comes after all that was told of it."""
        delta = kind.removesuffix(".done") + ".delta"
        if kind.endswith(".done") and self._texts[delta, place[1]]:
            raise SeamError("another replica's answer is shorter")


def _read(event: bytes) -> dict[str, Any]:
    try:
        _, _, data = event.partition(b"\ndata: ")
        found: dict[str, Any] = json.loads(data)
        _place(found)
        if found["type"].endswith(".delta"):
            found["delta"] + ""
        if "response" in found:
            found["response"]["id"].encode(), found["response"]["created_at"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SeamError("the rest cannot be told") from None
    return found


def _place(event: dict[str, Any]) -> _Place:
    return event["type"], event.get("output_index", 0)
