"""The token before a text that is scored, on which scores of short texts depend."""

from __future__ import annotations

from paceline.errors import RequestError
from paceline.lm import LM


def prefix_tokens(lm: LM, prefix: str) -> list[int]:
    """Return the tokens before every text.

    Args:
        lm: the model.
        prefix: `auto`: those that the tokenizer puts there; `none`; or the text of a token, e.g.
            `<|im_start|>`.

    Raises:
        RequestError: the model has no such token.
    """
    if prefix == "none":
        return []
    if prefix == "auto":
        return list(lm.tokenizer.encode(""))[:1]
    token = lm.tokenizer.token_id(prefix)
    if token is None:
        raise RequestError(
            f"the model has no token {prefix!a:.80} for --prefix; give auto, none or a token's text"
        )
    return [token]


def prefix_name(lm: LM, prefix: str) -> str:
    """Return the text of the token before every text; `none` without one.

    Raises:
        RequestError: as `prefix_tokens`.
    """
    tokens = prefix_tokens(lm, prefix)
    return lm.tokenizer.token(tokens[0]) if tokens else "none"
