r"""How a byte-level BPE splits a text before it merges: the names that GGUF files use.

A GGUF file stores no regular expression, only a name (`tokenizer.ggml.pre`), which llama.cpp maps
to one. The expressions here are those of the original tokenizers, in Oniguruma's syntax. llama.cpp
has no classes of letters by case, nor of marks within words, and approximates them: where that
changes the result (`tekken` and `gpt-4o` split Hindi at each vowel sign there), the original is
followed, since the model was trained with it. With the tokens of Qwen 2.5 all other names gave the
ids of llama.cpp on 761 texts, mostly of random characters of many scripts.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import ModelError

_CONTRACTION = r"'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])"
_GPT2 = r"'(?:[stmd]|[rv]e|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CJK = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
_DEEPSEEK_CJK = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"
_PUNCTUATED_WORD = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_NOT_NAMED = "convert the model again with a current llama.cpp, whose converter names it"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How to split a text, and what goes with it.

    Attributes:
        patterns: applied in turn, each to the parts that the one before left; a match and what
            lies between matches are parts.
        ignore_merges: a part that is a token is taken as it is.
        add_bos: the default of `tokenizer.ggml.add_bos_token`.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _words(
    digits: str,
    *,
    word: str = r"[^\r\n\p{L}\p{N}]?\p{L}+",
    symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    breaks: str = r"\s*[\r\n]+",
    spaces: str = r"\s+(?!\S)|\s+",
    contraction: str = _CONTRACTION,
) -> str:
    """Return an expression of the kind that began with GPT-4's cl100k."""
    return "|".join(filter(None, (contraction, word, digits, symbols, breaks, spaces)))


def _cased(end: str, *, not_han: bool = False) -> str:
    """Return the expression of words that begin anew at a capital, as in o200k."""
    but = r"&&[^\p{Han}]" if not_han else ""
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]",
        (rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"),
    )
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}"


_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_O200K = _words(
    r"\p{N}{1,3}",
    word=_cased(f"(?:{_CONTRACTION})?"),
    symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    contraction="",
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK_TAIL = _words(
    "",
    word=_PUNCTUATED_WORD,
    symbols=r" ?[\p{P}\p{S}]+[\r\n]*",
    contraction="",
)

# Cased letters, but for the alphabets that DeepSeek's list leaves out.
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8A}\x{2D00}-\x{2D2D}"
    r"\x{A790}-\x{A7FA}\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{10D50}-\x{10D85}"
    r"\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF2A}]]"
)

_TABLE: tuple[tuple[PreTokenizer, str], ...] = (
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 lfm2 pixtral midm-2.0 jina-v5-nano",
    ),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe glm4"),
    (
        PreTokenizer((_QWEN2,)),
        "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2 grok-2 solar-open",
    ),
    (
        PreTokenizer(
            (
                _words(
                    r"\p{N}",
                    word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                    symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                ),
            )
        ),
        "qwen35",
    ),
    (
        PreTokenizer((r"\p{N}", _GPT2)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    (
        PreTokenizer((_GPT2,)),
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum "
        "modern-bert jina-es jina-de jina-v2-es jina-v2-de",
    ),
    (
        PreTokenizer(
            (
                _words(
                    r"\p{N}",
                    word=_cased(""),
                    symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                    contraction="",
                ),
            ),
            ignore_merges=True,
            add_bos=True,
        ),
        "tekken",
    ),
    (PreTokenizer((_O200K,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (PreTokenizer((_O200K,), ignore_merges=True), "granite-embed-multi-97m"),
    (
        PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK_TAIL)),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    ),
    (
        PreTokenizer(
            (
                r"\p{N}{1,3}",
                _CJK,
                _words(
                    "",
                    word=_PUNCTUATED_WORD,
                    symbols=r" ?[\p{P}\p{S}]+",
                    breaks=r"[\r\n]",
                    contraction="",
                ),
            )
        ),
        "spark2_5",
    ),
    (
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
        "deepseek-coder",
    ),
    (
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?{_DEEPSEEK_LETTERS}+",
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
                r"\s+$",
                _DEEPSEEK_CJK,
                r"\p{N}+",
            )
        ),
        "deepseek-llm",
    ),
    (
        PreTokenizer(
            (
                r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|"
                r"[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}"
                r"\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|" + _CJK,
                _words(
                    r"\p{N}",
                    word=_cased(f"(?:{_CONTRACTION})?"),
                    symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                    contraction="",
                ),
            ),
            ignore_merges=True,
        ),
        "youtu",
    ),
    (
        PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
        "falcon",
    ),
    (PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
    (PreTokenizer((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizer((_BLOOM, r"\p{N}")), "viking"),
    (
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
        "chameleon",
    ),
    (
        PreTokenizer(
            (
                _words(
                    r"\p{N}{1,3}",
                    spaces="|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1))
                    + r"|\s{1,2}(?!\S)|\s",
                ),
            )
        ),
        "jais-2",
    ),
    (
        PreTokenizer((_words(r"\p{N}", breaks=r"\s*[\r\n]"),)),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (PreTokenizer((_words(r"\p{N}", symbols=r" ?[^\s\p{L}\p{N}]+"),)), "seed-coder"),
    (PreTokenizer((_words(r"\p{N}", contraction=""),)), "ufakzeka"),
    (PreTokenizer((r"\n+|[^\n]+", _QWEN2)), "laguna"),
    (
        PreTokenizer((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
        "minicpm5",
    ),
    (
        PreTokenizer(
            (
                _words(
                    r"\p{N}",
                    word=r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    breaks=r"\s*[\r\n]",
                ),
            )
        ),
        "exaone-moe",
    ),
    (
        PreTokenizer(
            (
                r"\p{Han}+|"
                + _words(
                    r"\p{N}{1,3}",
                    word=_cased(f"(?:{_CONTRACTION})?", not_han=True),
                    contraction="",
                ),
            )
        ),
        "kimi-k2",
    ),
)

PRE_TOKENIZERS = {name: kind for kind, names in _TABLE for name in names.split()}


def find_pre_tokenizer(name: str | None, where: str) -> PreTokenizer:
    """Return the pre-tokenizer of a name.

    Args:
        name: value of `tokenizer.ggml.pre`, None if absent.
        where: the file, for error messages.

    Raises:
        ModelError: there is none of this name, or no name: a guess would give other tokens than
            those that the model was trained on, without any sign of it.
    """
    if name is None:
        raise ModelError(f"{where} does not name its pre-tokenizer; {_NOT_NAMED}")
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where} needs the pre-tokenizer {name!r:.80}, which Paceline does not know; use the "
            "model's safetensors checkpoint with its tokenizer.json"
        )
    return PRE_TOKENIZERS[name]
