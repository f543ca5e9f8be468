"""A SentencePiece tokenizer of pieces with scores, with the interface of `tokenizers.Tokenizer`.

The `tokenizers` package has no merging by score: it needs a list of merges, which for the 262,144
pieces of Gemma takes two seconds and 400 MB to rebuild, and which orders equal scores in another
way. The compiled module merges by score itself, and is ready in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders

from paceline import _native
from paceline.core import Floats
from paceline.errors import ModelError

SPACE = "\u2581"


class PieceIds(NamedTuple):
    """The result of `SentencePieceBackend.encode`."""

    ids: list[int]


class SentencePieceBackend:
    """Pieces with scores, of which the best-scored adjacent pair is merged first.

    Args:
        pieces: their text in UTF-8, with U+2581 for spaces; `<0x0A>` stands for a byte.
        scores: float32 [V].
        added: the pieces that are found in a text as they are, by id; special ones are left out of
            a decoded text.
        unknown: id of the piece for bytes that have none; None if there is none.
        prefix: whether a space is put before a text and after each added piece, and decoding drops
            the first space.

    Attributes:
        decoder: turns pieces into text.

    Raises:
        ModelError: pieces are empty, equal, too long or not UTF-8, or scores are not numbers.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        scores: Floats,
        added: dict[int, AddedToken],
        unknown: int | None,
        prefix: bool,
    ) -> None:
        special: NDArray[np.uint8] = np.zeros(len(pieces), np.uint8)
        for index, token in added.items():
            special[index] = 2 if token.rstrip else 1
        try:
            b"\n".join(pieces).decode()
            self._native = _native.SentencePiece(
                list(pieces), scores, special, -1 if unknown is None else unknown, prefix
            )
        except UnicodeDecodeError as error:
            raise ModelError(f"the tokenizer has pieces that are not UTF-8: {error}") from None
        except ValueError as error:
            raise ModelError(f"the tokenizer is invalid: {error}") from None
        self._pieces, self._scores = pieces, scores
        self._added, self._unknown, self._prefix = added, unknown, prefix
        self.decoder: decoders.Decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if prefix else [])
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> PieceIds:
        """Return the pieces of a text; nothing is ever added to it."""
        return PieceIds(self._native.encode(text.encode()).tolist())

    def without_special(self) -> SentencePieceBackend:
        """Return a copy that finds no special pieces in a text."""
        others = {index: token for index, token in self._added.items() if not token.special}
        return SentencePieceBackend(self._pieces, self._scores, others, self._unknown, self._prefix)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some pieces; ids that do not exist have none."""
        return self.decoder.decode([piece for index in ids if (piece := self.id_to_token(index))])

    def id_to_token(self, index: int) -> str | None:
        """Return a piece; None if there is none."""
        return self._pieces[index].decode() if 0 <= index < len(self._pieces) else None

    def token_to_id(self, text: str) -> int | None:
        """Return the id of a piece; None if there is none."""
        index = self._native.find(text.encode("utf-8", "surrogatepass"))
        return None if index < 0 else index

    def get_vocab(self, *, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the id of each piece."""
        return {piece.decode(): index for index, piece in enumerate(self._pieces)}

    def get_vocab_size(self, *, with_added_tokens: bool = True) -> int:
        """Return the number of pieces."""
        return len(self._pieces)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Return the pieces that are found in a text as they are."""
        return self._added
