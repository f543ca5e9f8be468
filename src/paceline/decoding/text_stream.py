"""Streaming of text: stop strings are cut, and text that may become one is held back."""

from __future__ import annotations

from typing import Protocol

from paceline.core import Request
from paceline.models.detokenize import Decoder, Detokenizer


class StreamingDecoder(Protocol):
    """Decodes tokens incrementally; see `models.detokenize.Detokenizer`."""

    def push(self, token: int) -> str:
        """Return the text that `token` completes; may be empty."""
        ...

    def flush(self) -> str:
        """Return the text that is still held back."""
        ...


class TextStream:
    """Text of a growing output, up to the first stop string.

    Text that may begin a stop string is held back until it does or does not.
    """

    def __init__(self, pieces: StreamingDecoder, stops: tuple[str, ...] = ()) -> None:
        self._pieces = pieces
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False
        self.stopped_by = ""  # the stop string that ended the text

    def push(self, token: int) -> str:
        """Return the text that is final now. Sets `stopped` if a stop string is complete."""
        return self._release(self._pieces.push(token))

    def flush(self) -> str:
        """Return the rest, when the output has ended."""
        if self.stopped:
            return ""
        text = self._release(self._pieces.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._held += text
        starts = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if starts:
            start, self.stopped_by = min(starts, key=lambda each: each[0])
            self.stopped = True
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def text_of(request: Request, tokenizer: Decoder) -> TextStream:
    """Return the text stream of a request's output."""
    return TextStream(pieces_of(request, tokenizer), request.stop_strings)


def pieces_of(request: Request, tokenizer: Decoder) -> Detokenizer:
    """Return the decoder of a request's output, which does not cut stop strings."""
    return Detokenizer(tokenizer, request.prompt if request.continues else ())


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
