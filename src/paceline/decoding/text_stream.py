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

    Args:
        pieces: decodes the tokens.
        stops: the stop strings.
        after: stop strings that are complete within so many tokens are text like any other.
        include: the text ends with the stop string, not before it.
    """

    def __init__(
        self,
        pieces: StreamingDecoder,
        stops: tuple[str, ...] = (),
        after: int = 0,
        include: bool = False,
    ) -> None:
        self._pieces = pieces
        self._left, self._include = after, include
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False
        self.stopped_by = ""  # the stop string that ended the text

    def push(self, token: int) -> str:
        """Return the text that is final now. Sets `stopped` if a stop string is complete."""
        self._left -= 1
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
        known = len(self._held)
        self._held += text
        # Only those that the new text completes: what was held may hold one that did not count.
        found = ((self._held.find(s, max(known - len(s) + 1, 0)), s) for s in self._stops)
        starts = [(start, stop) for start, stop in found if start >= 0]
        if starts and self._left < 0:
            start, self.stopped_by = min(starts, key=lambda each: each[0])
            self.stopped = True
            end = start + len(self.stopped_by) if self._include else start
            shown, self._held = self._held[:end], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def text_of(request: Request, tokenizer: Decoder) -> TextStream:
    """Return the text stream of a request's output."""
    pieces = pieces_of(request, tokenizer)
    return TextStream(pieces, request.stop_strings, request.stop_after, request.include_stop)


def pieces_of(request: Request, tokenizer: Decoder) -> Detokenizer:
    """Return the decoder of a request's output, which does not cut stop strings."""
    decoder = tokenizer.with_special() if request.keep_special else tokenizer
    return Detokenizer(decoder, request.prompt if request.continues else ())


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
