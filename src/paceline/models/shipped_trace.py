"""Small traces that come with Paceline, for models of the catalogue whose licence allows it.

A file is LZMA-compressed: a line of JSON with the numbers `texts` R, `tokens` T and `top` K, then
the lengths of the texts, uint32 [R]; the tokens, uint16 [T]; the successors, uint16 [T, K]; and
their probabilities in 255ths, uint8 [T, K]; all little-endian. It is named after the fingerprint of
the model that wrote the text.
"""

from __future__ import annotations

import json
import lzma
from itertools import pairwise
from pathlib import Path

import numpy as np

from paceline.core import Floats
from paceline.errors import MethodError, ModelError
from paceline.models.trace import Trace

FOLDER = Path(__file__).with_name("traces")
_MOST_TOKENS = 1 << 16  # of a vocabulary


def pack_trace(trace: Trace, top: int, most: int) -> bytes:
    """Return the first texts of a trace in the shipped form.

    Args:
        trace: of a vocabulary of at most 65,536 tokens.
        top: successors that are kept of each token.
        most: tokens at most; whole texts are kept.

    Raises:
        MethodError: a token does not fit, or the first text is longer than `most`.
    """
    texts = list(trace.texts())
    kept = [text for text in texts if text.stop <= most]
    if not kept:
        raise MethodError(f"the first text has {texts[0].stop} tokens, expected {most} at most")
    end = kept[-1].stop
    tokens, successors = trace.tokens[:end], trace.top_tokens[:end, :top]
    if max(tokens.max(), successors.max()) >= _MOST_TOKENS:
        raise MethodError(
            f"a token is above {_MOST_TOKENS - 1}, which the shipped form cannot hold"
        )
    head = {"texts": len(kept), "tokens": end, "top": successors.shape[1]}
    parts = (
        np.array([text.stop - text.start for text in kept], "<u4"),
        tokens.astype("<u2"),
        successors.astype("<u2"),
        np.rint(trace.top_probs[:end, :top] * 255).astype("u1"),
    )
    raw = json.dumps(head).encode() + b"\n" + b"".join(part.tobytes() for part in parts)
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def shipped_trace(fingerprint: str, folder: Path = FOLDER) -> Trace | None:
    """Return the trace that is shipped for a model, or None.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / f"{fingerprint}.xz"
    if not path.is_file():
        return None
    try:
        line, _, rest = lzma.decompress(path.read_bytes()).partition(b"\n")
        head = json.loads(line)
        texts, tokens, top = (int(head[name]) for name in ("texts", "tokens", "top"))
        sizes = (4 * texts, 2 * tokens, 2 * tokens * top, tokens * top)
        if len(rest) != sum(sizes):
            raise ValueError
        ends = np.cumsum([0, *sizes])
        parts = [rest[a:b] for a, b in pairwise(ends)]
        lengths = np.frombuffer(parts[0], "<u4").astype(np.int32)
        if lengths.sum() != tokens or not lengths.all():
            raise ValueError
        return Trace(
            np.frombuffer(parts[1], "<u2").astype(np.int32),
            np.cumsum([0, *lengths[:-1]], dtype=np.int32),
            np.frombuffer(parts[2], "<u2").astype(np.int32).reshape(tokens, top),
            _probabilities(parts[3]).reshape(tokens, top),
        )
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError, OSError, MethodError):
        raise ModelError(f"{path} is damaged; install Paceline again") from None


def _probabilities(raw: bytes) -> Floats:
    probs: Floats = np.frombuffer(raw, "u1").astype(np.float32)
    probs /= 255
    return probs
