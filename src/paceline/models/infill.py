"""Fill in the middle: prompts of a text before and a text after what is written.

Models that were trained for it mark the parts by special tokens, in the order prefix, suffix,
middle ("PSM"; Bavarian et al., 2022, arXiv 2207.14255).
"""

from __future__ import annotations

from paceline.errors import RequestError
from paceline.models.tokenizer import Tokenizer

# Before the prefix, before the suffix, before the middle: of Qwen, CodeGemma; StarCoder, Granite;
# SantaCoder; DeepSeek.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
# Tokens that end the middle, also of models whose answers to conversations end otherwise.
_ENDS = (
    "<|endoftext|>",
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<|repo_name|>",
    "<fim_pad>",
    "<file_sep>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def encode_infill(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    special: bool = True,
    split_special: bool = False,
) -> list[int]:
    """Return the token ids after which the model writes what is between two texts.

    Args:
        tokenizer: of the model.
        prefix: what stands before.
        suffix: what stands behind.
        special: whether the token that begins every text begins this one.
        split_special: special tokens in the texts are text.

    Raises:
        RequestError: the model has no tokens for it.
    """
    before, behind, middle = _marks(tokenizer)
    begin = tokenizer.special_id("bos_token")
    begins = special and begin is not None and tokenizer.encode("a")[:1] == [begin]
    return [
        *([begin] if begins and begin is not None else []),
        before,
        *tokenizer.encode(prefix, False, split_special),
        behind,
        *tokenizer.encode(suffix, False, split_special),
        middle,
    ]


def infill_stops(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end what is filled in.

    Raises:
        RequestError: the model has no tokens for it.
    """
    ends = [tokenizer.token_id(name) for name in _ENDS]
    return sorted({*_marks(tokenizer), *(each for each in ends if each in tokenizer.silent)})


def _marks(tokenizer: Tokenizer) -> tuple[int, int, int]:
    for names in _MARKS:
        before, behind, middle = (tokenizer.token_id(name) for name in names)
        if before is not None and behind is not None and middle is not None:
            return before, behind, middle
    raise RequestError(
        "this model cannot fill in the middle: its vocabulary has no such tokens as "
        f"{_MARKS[0][0]}; leave suffix out, or take a model for code"
    )
