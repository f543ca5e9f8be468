"""Pre-tokenizers by name, against the expressions that the original tokenizers publish."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from paceline.errors import ModelError
from paceline.models.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer

regex = pytest.importorskip("regex")

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FALCON = r"[\p{P}\$\+<=>\^~\|`]+"
EXPECTED = {
    "gpt-2": [GPT2],
    "olmo": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "llama-bpe": [CL100K],
    "glm4": [CL100K],
    "qwen2": [QWEN2],
    "stablelm2": [QWEN2],
    "qwen35": [QWEN35],
    "gpt-4o": [O200K],
    "tekken": [TEKKEN],
    "deepseek-v3": [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "falcon": [FALCON, GPT2, r"[0-9][0-9][0-9]"],
    "default": [FALCON.replace("`", ""), GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "bloom": [r" ?[^(\s|.,!?…。，、।۔،)]+"],
    "viking": [r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"],
    "seed-coder": [
        QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),
    ],
    "bailingmoe": [QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]")],
    "ufakzeka": [QWEN2.removeprefix(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|")],
    "minicpm5": [r"\p{N}{1,3}", CL100K.replace(r"\p{N}{1,3}", r"\p{N}+")],
    "exaone-moe": [
        QWEN2.replace(r"?\p{L}+", r"?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+")
        .replace(r"[\r\n]*", r"[\r\n/]?")
        .replace(r"\s*[\r\n]+", r"\s*[\r\n]")
    ],
}
SAMPLES = [
    "Hello world, it's 12345 o'clock",
    "  leading\n\n\n  and trailing  \t\n ",
    "CamelCaseHTTPServer iPhone ÉTÉ été ǅ",
    "हिन्दी भाषा é e\u0301 नमस्ते",  # vowel signs are marks
    "中文字，日本語のテキスト。한국어 문장",
    "!!! -- ...\n// comment\r\n\r\n<|x|> a/b\n/",
    "I'LL we'Ve 'sam x's\u00a0y\u2003z \u3000w",
    "x=1+2; ½ Ⅷ ٣٤٥ 1,234.5 €5 `code` $a^b~c|d",
    "😀👍🏽 \U0001f468\u200d\U0001f469 \ufeff\u200b",
    "",
    " ",
    "\r",
    "a  b   c\td\u0085e\x0bf\x0cg\x1ch",
]
TEXT = st.text(st.one_of(st.sampled_from(" \t\r\n'aAéÉ1٣.,/!क्中の한$`sStTlLreRE"), st.characters()))
_SURROGATES = range(0xD800, 0xE000)


@cache
def splitter(name: str) -> pre_tokenizers.PreTokenizer:
    patterns = PRE_TOKENIZERS[name].patterns
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    )


def split(name: str, text: str) -> list[str]:
    return [part for part, _ in splitter(name).pre_tokenize_str(text)]


def reference(patterns: list[str], text: str) -> list[str]:
    """Apply each expression to the parts of the last; what it does not match stays a part."""
    parts = [text] if text else []
    for pattern in patterns:
        now = []
        for part in parts:
            at = 0
            for match in regex.finditer(pattern, part):
                now += [part[at : match.start()], match[0]]
                at = match.end()
            now.append(part[at:])
        parts = [part for part in now if part]
    return parts


@pytest.mark.parametrize("name", EXPECTED)
def test_texts_are_split_as_published(name: str) -> None:
    for text in SAMPLES:
        assert split(name, text) == reference(EXPECTED[name], text)


@pytest.mark.parametrize("name", EXPECTED)
@given(text=TEXT)
def test_any_text_is_split_as_published(name: str, text: str) -> None:
    # The two engines know Unicode of different years, and Unicode folds U+017F to s.
    known = "".join(c for c in text if regex.match(r"[\p{L}\p{M}\p{N}\p{P}\p{S}\p{Z}\s]", c))
    known = "".join(c for c in known if c != "\u017f" and ord(c) not in _SURROGATES)
    known = "".join(c for c in known if c in OLD)
    assert split(name, known) == reference(EXPECTED[name], known)


class _Old:
    """The characters whose class both engines agree on."""

    def __contains__(self, character: str) -> bool:
        return agreed(character)


@cache
def agreed(character: str) -> bool:
    classes = [r"\p{Lu}", r"\p{Ll}", r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{M}", r"\p{N}", r"\p{P}"]
    for kind in [*classes, r"\p{S}", r"\s"]:
        kept = pre_tokenizers.Split(Regex(kind), "removed").pre_tokenize_str(character)
        if bool(kept) == bool(regex.match(kind, character)):
            return False
    return True


OLD = _Old()


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(name: str) -> None:
    for text in SAMPLES:
        assert "".join(split(name, text)) == text


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_long_runs_are_split_in_little_time(name: str) -> None:
    for unit in ("a", "A", "é", "中", " ", "\n", "1", ".", "ि", " a", "\t", "'s"):
        text = unit * 20_000
        assert "".join(split(name, text)) == text


def test_deepseek_llm_knows_old_alphabets_only() -> None:
    # Its punctuation includes the letters of ASCII, which splits words once more.
    assert split("deepseek-llm", "Straße Ωμέγα") == ["Stra", "ß", "e", " Ωμέγα"]
    assert split("deepseek-llm", "aქბ") == ["a", "ქბ"]
    assert split("deepseek-llm", "中文abc 123") == ["中文", "abc", " ", "123"]


def test_kimi_k2_keeps_han_apart() -> None:
    assert split("kimi-k2", "中文abc 日本のx") == ["中文", "abc", " ", "日本", "のx"]


def test_jais_2_halves_spaces() -> None:
    assert [len(part) for part in split("jais-2", " " * 23 + "x")] == [16, 4, 2, 2]


def test_the_documentation_lists_every_name() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
    listed = page.read_text().partition("Known:\n")[2].partition("\n- ")[0]
    assert re.findall("`(.+?)`", listed) == sorted(PRE_TOKENIZERS)


@pytest.mark.parametrize("name", ["superbpe", "gemma4", "whitespace", "", "Qwen2"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"needs the pre-tokenizer '{name}'"):
        find_pre_tokenizer(name, "x.gguf")


def test_no_name_is_refused() -> None:
    with pytest.raises(ModelError, match="does not name its pre-tokenizer"):
        find_pre_tokenizer(None, "x.gguf")
