"""From tokens to text a user may see: stop strings are cut, and nothing is shown too early."""

from __future__ import annotations

from typing import Protocol

from paceline.core import Request
from paceline.models.detokenize import Decoder, Detokenizer


class StreamingDecoder(Protocol):
    """Turns tokens into text bit by bit; see `models.detokenize.Detokenizer`."""

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty."""
        ...

    def flush(self) -> str:
        """Text still held back."""
        ...


class TextStream:
    """Text of a growing output that never runs past a stop string.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, pieces: StreamingDecoder, stops: tuple[str, ...] = ()) -> None:
        self._pieces = pieces
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that may be shown now. `stopped` tells whether a stop string was completed."""
        return self._release(self._pieces.push(token))

    def flush(self) -> str:
        """The rest, when the output has ended."""
        if self.stopped:
            return ""
        text = self._release(self._pieces.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def text_of(request: Request, tokenizer: Decoder) -> TextStream:
    """The text of a request's output."""
    return TextStream(pieces_of(request, tokenizer), request.stop_strings)


def pieces_of(request: Request, tokenizer: Decoder) -> Detokenizer:
    """What makes that text of tokens, stop strings and what follows them included."""
    return Detokenizer(tokenizer, request.prompt if request.continues else ())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
