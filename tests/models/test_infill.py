"""Filling in the middle: the order of the marks, and who can."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import paceline
from paceline import LM
from paceline.errors import RequestError
from paceline.models.infill import encode_infill, infill_stops
from paceline.models.tokenizer import Tokenizer
from paceline.serving.api.parse import RequestLimits, completion_jobs
from paceline.serving.api.schemas import CompletionBody

FAMILIES = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "santacoder": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    "deepseek": (
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
    ),
}


def tokenizer_with(special, **settings):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({each: i for i, each in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|endoftext|>", *special])
    return Tokenizer(backend, {"bos_token": "<s>", **settings})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begins", [False, True])
def test_the_parts_stand_between_their_marks(family, begins):
    marks = FAMILIES[family]
    tokenizer = tokenizer_with(marks, add_bos_token=begins)
    ids = encode_infill(tokenizer, "ab ", " c\n")
    assert encode_infill(tokenizer, "ab ", " c\n", special=False) == ids[begins:]
    before, behind, middle = (tokenizer.token_id(mark) for mark in marks)
    first = [tokenizer.token_id("<s>")] if begins else []
    ab, c = tokenizer.encode("ab ", special=False), tokenizer.encode(" c\n", special=False)
    assert ids == [*first, before, *ab, behind, *c, middle]
    assert {before, behind, middle, tokenizer.token_id("<|endoftext|>")} == set(
        infill_stops(tokenizer)
    )


def test_a_model_without_marks_is_refused():
    tokenizer = tokenizer_with(FAMILIES["qwen"][:2])
    with pytest.raises(RequestError, match="cannot fill in the middle"):
        encode_infill(tokenizer, "a", "b")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """The embedded model, three of whose tokens are named as marks."""
    folder = tmp_path_factory.mktemp("infill")
    for file in (Path(paceline.__file__).parent / "embedded").iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    source = Path(paceline.__file__).parent / "embedded" / "tokenizer.json"
    settings = json.loads(source.read_text())
    vocabulary = settings["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[-3:]
    merges = settings["model"]["merges"]
    settings["model"]["merges"] = [
        each
        for each in merges
        if not {"".join(each) if isinstance(each, list) else each.replace(" ", "")} & set(last)
    ]
    for token, mark in zip(last, FAMILIES["qwen"], strict=True):
        index = vocabulary.pop(token)
        vocabulary[mark] = index
        settings["added_tokens"].append(
            {"id": index, "content": mark, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with LM(folder) as made:
        yield made


def test_suffix_is_an_option_of_a_request(lm):
    request = lm.request("Once ", suffix=" time", max_new_tokens=4)
    assert list(request.prompt) == encode_infill(lm.tokenizer, "Once ", " time")
    assert set(infill_stops(lm.tokenizer)) <= request.stop_tokens
    assert not set(infill_stops(lm.tokenizer)) & set(
        lm.request("Once ", suffix=" time", ignore_eos=True).stop_tokens
    )
    assert lm.generate("Once ", suffix=" time", max_new_tokens=4).tokens
    with pytest.raises(RequestError, match="the prompt with a suffix"):
        lm.request([5, 6], suffix=" time")


def jobs(lm, **fields):
    body = CompletionBody(max_tokens=4, **fields)
    return completion_jobs(lm, body, "x", "", RequestLimits())


def test_completions_have_a_suffix(lm):
    (first,), (second,) = jobs(lm, prompt=["Once ", "He "], suffix=" time")
    assert list(first.request.prompt) == encode_infill(lm.tokenizer, "Once ", " time")
    assert list(second.request.prompt) == encode_infill(lm.tokenizer, "He ", " time")
    assert set(infill_stops(lm.tokenizer)) <= first.request.stop_tokens
    for fields, message in (
        ({"prompt": [5, 6]}, "needs a prompt of text"),
        ({"prompt": "a", "echo": True}, "echo is true"),
    ):
        with pytest.raises(RequestError, match=message):
            jobs(lm, suffix="b", **fields)
    with LM() as other, pytest.raises(RequestError, match="cannot fill in the middle"):
        jobs(other, prompt="a", suffix="b")
    (plain,) = jobs(lm, prompt="Once ", suffix="")[0]
    assert list(plain.request.prompt) == lm.encode("Once ")
