"""Does what `resume` does for the streams of `/v1/responses`: named, numbered events and items."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from paceline.serving.cluster.resume import SeamError

_Place = tuple[str, int]  # kind of an event, and the item of the output


class ResumedItems:
    """What a client was sent of a response, and what is new in another stream of the same request.

    Args:
        sent: the events so far, complete, each with the blank line after it.
        ago: as for `ResumedStream`; unused, since nothing here has a time.

    Raises:
        SeamError: an event is malformed.
    """

    def __init__(self, sent: bytes, ago: Callable[[], float] = float) -> None:
        del ago
        self._begin: dict[str, Any] = {}  # id and time of the response that was sent
        self._other = b""  # id of the one that continues it
        self._sent: set[_Place] = set()
        self._texts: defaultdict[_Place, str] = defaultdict(str)  # sent, and not seen again yet
        events = [_read(event) for event in sent.split(b"\n\n") if event]
        self._number = len(events)
        for event in events:
            if "response" in event:
                self._begin = {key: event["response"][key] for key in ("id", "created_at")}
            if event["type"].endswith(".delta"):
                self._texts[_place(event)] += event["delta"]
            else:
                self._sent.add(_place(event))

    def rest(self, event: bytes) -> bytes:
        """Return an event of the other stream without what was sent; empty if nothing is left.

        Raises:
            SeamError: its text differs; or see the class.
        """
        parsed = _read(event)
        if self._begin and "response" in parsed:
            self._other = parsed["response"]["id"].encode()
        if self._other:  # the ids of its items begin with it
            parsed = _read(event.replace(self._other, self._begin["id"].encode()))
        if self._begin and "response" in parsed:
            parsed["response"] |= self._begin
        place = _place(parsed)
        if parsed["type"].endswith(".delta"):
            parsed["delta"] = self._new(place, parsed["delta"])
            if not parsed["delta"]:
                return b""
        else:
            self._check_end(parsed["type"], place)
            if place in self._sent:
                return b""
        parsed["sequence_number"] = self._number
        self._number += 1
        data = json.dumps(parsed, ensure_ascii=False)
        return f"event: {parsed['type']}\ndata: {data}\n\n".encode()

    def _new(self, place: _Place, delta: str) -> str:
        known = self._texts[place]
        size = min(len(known), len(delta))
        if known[:size] != delta[:size]:
            raise SeamError("another replica's answer differs")
        self._texts[place] = known[size:]
        return delta[size:]

    def _check_end(self, kind: str, place: _Place) -> None:
        """Refuse the end of an item before all of its text that was sent has been seen again."""
        delta = kind.removesuffix(".done") + ".delta"
        if kind.endswith(".done") and self._texts[delta, place[1]]:
            raise SeamError("another replica's answer is shorter")


def _read(event: bytes) -> dict[str, Any]:
    try:
        _, _, data = event.partition(b"\ndata: ")
        parsed: dict[str, Any] = json.loads(data)
        _place(parsed)
        if parsed["type"].endswith(".delta"):
            parsed["delta"] + ""
        if "response" in parsed:
            parsed["response"]["id"].encode(), parsed["response"]["created_at"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SeamError("the rest of this stream cannot be reconstructed") from None
    return parsed


def _place(event: dict[str, Any]) -> _Place:
    return event["type"], event.get("output_index", 0)
