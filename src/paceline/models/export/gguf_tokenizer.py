"""Tokenizer metadata of a GGUF file, from a tokenizer.json.

Two kinds can be told to llama.cpp: byte-level BPE, whose way to split a text has a name there, and
SentencePiece BPE with a score for each piece. The name is found by trying: all known ways split the
same probe. In the end the tokenizer is built from the metadata again and must give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

from paceline.errors import ModelError
from paceline.models.export.gguf_metadata import as_read
from paceline.models.fields import read_json
from paceline.models.formats.gguf_writer import Value
from paceline.models.gguf_tokenizer import make_tokenizer
from paceline.models.gguf_vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    find_stop_tokens,
)
from paceline.models.model import Model
from paceline.models.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from paceline.models.tokenizer import Tokenizer

UNUSED, BYTE = 5, 6
_ROLES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}
# What known tokenizers split differently: contractions by case, runs of digits, letters with marks,
# scripts, words by case, punctuation before letters, breaks, and spaces of all lengths.
PROBES = (
    "Hello, world! It's I'M we'll They'RE don't  o'clock 'tis can'T",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ ²³ ٣٤٥ x86_64 v2.0.1-rc3",
    "camelCase HTTPServer iPhone XMLHttpRequest2 ALL_CAPS snake_case_name Über ÉCOLE",
    "नमस्ते दुनिया สวัสดีชาวโลก مرحبا بالعالم שלום Привет мир Γειά σου",
    "你好,世界。今天天气怎么样?こんにちは、世界!안녕하세요 세계",
    "tabs\tand\n\nbreaks\r\n  \n   indented\n\n\n\t\tdeep    \n trailing   ",
    "def f(x):\n    return {x: [y for y in x if y != '/']}  # comment //\n",
    'a/b\\c (d) [e] {f} <g> "h" `i` ~j~ @k #l $m% ^n & *o* +p= -q_ |r| ;s: ,t. ?u!',
    "...!!! ??? --- *** ==> <-- :-) 🙂👍🏽 🇩🇪 ☃ é è ñ zero\u200bwidth nb\u00a0space",
    "  leading   and    many     spaces      inside       ",
    "/path/to/file.txt\n//comment\n/* block */ http://example.org/?q=a+b&c=%20#x",
)


def tokenizer_metadata(model: Model) -> tuple[dict[str, Value], list[str]]:
    """Return the keys `tokenizer.*` of a model, and what a user should know of them.

    Those of a GGUF file are kept as they are. A folder without tokenizer.json gives a file that
    takes token ids only.

    Raises:
        ModelError: GGUF cannot express the tokenizer.
    """
    if model.gguf is not None:
        found = model.gguf.metadata.items()
        return {key: value for key, value in found if key.startswith("tokenizer.")}, []
    if not (model.path / "tokenizer.json").is_file():
        return {"tokenizer.ggml.model": "none"}, [
            "the file has no tokenizer, as the source has none"
        ]
    metadata = _Conversion(model).metadata()
    return metadata, _check(model, metadata)


class _Conversion:
    """The tokenizer.json of a model, in the words of GGUF."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._path = model.path / "tokenizer.json"
        self._values = read_json(self._path)
        self._backend = tokenizers.Tokenizer.from_file(str(self._path))

    def metadata(self) -> dict[str, Value]:
        """Return all keys."""
        bpe = self._values["model"]
        if bpe.get("type") != "BPE":
            raise self._refusal(f"its model is {bpe.get('type')!r:.40}, expected BPE")
        merges = [_pair(each) for each in bpe["merges"]]
        tokens, types = self._tokens()
        own: dict[str, Value]
        if self._is_byte_level():
            own = {"model": "gpt2", "pre": self._split_name(bool(bpe.get("ignore_merges")))}
            own |= {"tokens": tokens, "token_type": types}
            own["merges"] = [f"{left} {right}" for left, right in merges]
        elif bpe.get("byte_fallback"):
            own = {"model": "llama", "pre": "default", "tokens": tokens}
            own |= {"scores": _scores(tokens, merges), "token_type": types}
            own["add_space_prefix"] = self._prefixes_space()
        else:
            raise self._refusal("it is neither byte-level BPE nor SentencePiece with bytes")
        own |= self._roles() | self._begin_and_end()
        metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
        metadata |= self._other_ends(metadata)
        template = self._model.tokenizer.template
        return metadata | ({"tokenizer.chat_template": template.source} if template else {})

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"GGUF cannot express the tokenizer in {self._path}: {why}; write a safetensors folder "
            "instead"
        )

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Return the text and the type of each token; rows without one are unused."""
        size = self._model.config.vocab_size
        by_id = {index: token for token, index in self._values["model"]["vocab"].items()}
        added = {each["id"]: each for each in self._values.get("added_tokens", [])}
        by_id |= {index: each["content"] for index, each in added.items()}
        if max(by_id) >= size:
            raise self._refusal(f"it has {max(by_id) + 1} tokens for {size} rows of the embedding")
        tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
        types = [UNUSED if tokens[i] == f"[PAD{i}]" else NORMAL for i in range(size)]
        unknown = self._values["model"].get("unk_token")
        for index, token in by_id.items():
            if index in added:
                types[index] = CONTROL if added[index]["special"] else USER_DEFINED
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[index] = BYTE
            if token == unknown:
                types[index] = UNKNOWN
        return tokens, types

    def _is_byte_level(self) -> bool:
        return any(part.get("type") == "ByteLevel" for part in self._split_parts())

    def _split_parts(self) -> list[dict[str, Any]]:
        split = self._values.get("pre_tokenizer") or {}
        parts: list[dict[str, Any]] = split.get("pretokenizers", [split])
        return parts

    def _split_name(self, ignore_merges: bool) -> str:
        """Return the name of the way in which texts are split."""
        own = [self._backend.pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
        for name, split in PRE_TOKENIZERS.items():
            if split.ignore_merges == ignore_merges:
                other = _splitter(split)
                if all(other.pre_tokenize_str(t) == o for t, o in zip(PROBES, own, strict=True)):
                    return name
        patterns = [json.dumps(part.get("pattern", part["type"])) for part in self._split_parts()]
        raise self._refusal(f"no name is known for its pre-tokenizer {', '.join(patterns):.200}")

    def _prefixes_space(self) -> bool:
        """Return whether a space is put before a text."""
        ids = self._backend.encode("a", add_special_tokens=False).ids
        return bool(ids) and (self._backend.id_to_token(ids[0]) or "").startswith("\u2581")

    def _roles(self) -> dict[str, Value]:
        """Return the ids of special tokens."""
        config, stops = self._model.config, self._model.defaults.stop_tokens
        special = self._model.tokenizer.special
        ids = {
            role: self._backend.token_to_id(special[name])
            for role, name in _ROLES.items()
            if name in special
        }
        if ids.get("bos") is None:
            ids["bos"] = config.bos
        if ids.get("eos") is None:
            ids["eos"] = min(stops, default=None)
        return {f"{role}_token_id": index for role, index in ids.items() if index is not None}

    def _other_ends(self, metadata: Mapping[str, Value]) -> dict[str, Value]:
        """Return ids for the ends of an answer that readers do not know by their names."""
        seen = {key: as_read(value) for key, value in metadata.items()}
        stops = self._model.defaults.stop_tokens - find_stop_tokens(seen, str(self._path))
        roles = ("eot", "eom")
        pairs = zip(roles, sorted(stops), strict=False)
        return {f"tokenizer.ggml.{role}_token_id": index for role, index in pairs}

    def _begin_and_end(self) -> dict[str, Value]:
        """Return whether a text is put between the tokens that begin and end it."""
        tokenizer = self._model.tokenizer
        inner, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
        count = len(inner)
        at = next((i for i in range(len(whole)) if whole[i : i + count] == inner), None)
        roles = self._roles()
        if at is None:
            raise self._refusal("special tokens change how it splits a text")
        before, after = whole[:at], whole[at + count :]
        if before not in ([], [roles.get("bos_token_id")]) or after not in (
            [],
            [roles.get("eos_token_id")],
        ):
            raise self._refusal(f"it puts tokens {before} before and {after} after a text")
        return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge, in either way of writing it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> np.ndarray[Any, Any]:
    """Return scores by which earlier merges come first, float32 [V]."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return np.array([-ranks.get(token, len(merges)) for token in tokens], np.float32)


def _splitter(split: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _check(model: Model, metadata: Mapping[str, Value]) -> list[str]:
    """Refuse metadata that give other ids than the model's tokenizer; return what to note."""
    seen = {key: as_read(value) for key, value in metadata.items()}
    rebuilt: Tokenizer = make_tokenizer(seen, f"the GGUF file of {model.path.name}")
    own = model.tokenizer
    notes: list[str] = []
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    for text in PROBES:
        one, two = rebuilt.encode(text), own.encode(text)
        if join_unknown(one, unknown) != join_unknown(two, unknown):
            raise ModelError(
                f"GGUF cannot express the tokenizer of {model.path}: it would encode {text!r:.60} "
                "differently; write a safetensors folder instead"
            )
        if one != two and not notes:
            notes = ["unknown characters in a row become one token each, no longer one together"]
    if missing := model.defaults.stop_tokens - find_stop_tokens(seen, str(model.path)):
        raise ModelError(
            f"GGUF has no place for all tokens that end an answer of {model.path}: "
            f"{sorted(missing)} would be lost; write a safetensors folder instead"
        )
    return notes


def join_unknown(ids: list[int], unknown: object) -> list[int]:
    """Return ids with runs of the unknown token as one."""
    return [each for i, each in enumerate(ids) if each != unknown or ids[i - 1 : i] != [unknown]]
