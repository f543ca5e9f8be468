"""Files of a tokenizer for transformers: copied from a folder, or made from GGUF metadata."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import AddedToken

from paceline.errors import ModelError
from paceline.models.export.gguf_tokenizer import PROBES, join_unknown
from paceline.models.gguf_vocabulary import GGUFVocabulary
from paceline.models.model import Model
from paceline.models.tokenizer import read_tokenizer

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)
_SPACE = "\u2581"


def tokenizer_files(model: Model) -> dict[str, bytes]:
    """Return the contents of the files, by name; none where the source has no tokenizer.

    Raises:
        ModelError: tokenizer.json cannot express the tokenizer of a GGUF file.
    """
    if model.gguf is None:
        paths = (model.path / name for name in COPIED)
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    generation = {"generation_config.json": _json(_generation(model))}
    if model.gguf.metadata.get("tokenizer.ggml.model") in (None, "none"):
        return generation
    vocabulary = GGUFVocabulary(model.gguf.metadata, str(model.path))
    values = _sentence_piece(vocabulary) if vocabulary.kind == "llama" else _byte_level(model)
    tokenizer = model.tokenizer
    begin = tokenizer.encode("")
    values["post_processor"] = _template(tokenizer.special, begin, vocabulary)
    text = _json(values)
    _check(model, text, vocabulary.role("unknown"))
    adds_bos = begin[:1] == [vocabulary.role("bos")]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": len(begin) > int(adds_bos),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.context,
        **tokenizer.special,
    }
    if tokenizer.template:
        config["chat_template"] = tokenizer.template.source
    return {"tokenizer.json": text, "tokenizer_config.json": _json(config), **generation}


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _generation(model: Model) -> dict[str, Any]:
    """Return the sampling defaults and the tokens that begin and end a text."""
    defaults = model.defaults
    values: dict[str, Any] = {
        "bos_token_id": model.config.bos,
        "eos_token_id": sorted(defaults.stop_tokens),
        **defaults.samplers(),
    }
    if defaults.temperature:
        values |= {"do_sample": True, "temperature": defaults.temperature}
    return {key: value for key, value in values.items() if value not in (None, [])}


def _byte_level(model: Model) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(model.tokenizer.to_json())
    return values


def _sentence_piece(vocabulary: GGUFVocabulary) -> dict[str, Any]:
    """Return a tokenizer.json with merges in the order of the scores of what they make."""
    tokens = [vocabulary.decoded(index) for index in range(len(vocabulary.tokens))]
    scores = vocabulary.numbers("scores", "iuf").astype(np.float32)
    added = vocabulary.added()
    unknown = vocabulary.role("unknown")
    prefix = vocabulary.boolean("add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token) for index, token in added.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prepend, _replace(" ", _SPACE)],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(tokens, scores),
        },
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _added(index: int, token: AddedToken) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    own = {flag: bool(getattr(token, flag)) for flag in flags}
    return {"id": index, "content": token.content, **own}


def _merges(tokens: list[str], scores: np.ndarray[Any, Any]) -> list[list[str]]:
    """Return all pairs of pieces whose join is a piece, those of higher scores first."""
    ids = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort()
    return [[left, right] for *_, left, right in found]


def _template(
    special: dict[str, str], whole: list[int], vocabulary: GGUFVocabulary
) -> dict[str, Any] | None:
    """Return the post-processor that puts the tokens of an empty text around others."""
    if not whole:
        return None
    bos = vocabulary.role("bos")
    before = [index for index in whole[:1] if index == bos]
    after = whole[len(before) :]

    def single(kind: int) -> list[dict[str, Any]]:
        def tokens(ids: list[int]) -> list[dict[str, Any]]:
            names = [vocabulary.decoded(index) for index in ids]
            return [{"SpecialToken": {"id": name, "type_id": kind}} for name in names]

        text = {"Sequence": {"id": "AB"[kind], "type_id": kind}}
        return [*tokens(before), text, *tokens(after)]

    names = {index: vocabulary.decoded(index) for index in {*before, *after}}
    return {
        "type": "TemplateProcessing",
        "single": single(0),
        "pair": [*single(0), *single(1)],
        "special_tokens": {
            name: {"id": name, "ids": [index], "tokens": [name]} for index, name in names.items()
        },
    }


def _check(model: Model, text: bytes, unknown: int | None) -> None:
    """Refuse a tokenizer.json that gives other ids than the file's own tokenizer.

    Runs of unknown characters may be one token or several: the two count them differently.
    """
    written = read_tokenizer(text.decode(), f"the tokenizer.json of {model.name}")
    for probe in PROBES:
        one, two = written.encode(probe), model.tokenizer.encode(probe)
        if join_unknown(one, unknown) != join_unknown(two, unknown):
            raise ModelError(
                f"tokenizer.json cannot express the tokenizer of {model.path}: it would encode "
                f"{probe!r:.60} differently; write a GGUF file instead"
            )
