"""Special tokens in prompts and answers, where a request says what becomes of them."""

import httpx2 as httpx
import pytest

from paceline import LM
from paceline.serving.api import create_app
from paceline.serving.service import Service
from paceline.serving.worker import Worker
from tests.conftest import shared
from tests.serving.api.conftest import TEMPLATE, served


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A model whose texts begin with a special token."""
    folder = tmp_path_factory.mktemp("stories")
    for file in shared("models", "stories260K").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return LM(folder, drafter="plain", threads=1)


@pytest.fixture(scope="module")
def address(lm):
    service = Service(Worker(lm))
    service.start()
    with served(create_app(service, "stories")) as found:
        yield found
    service.stop()


def send(address, path, **body):
    done = httpx.post(
        f"{address}/v1/{path}", json={"temperature": 0, "seed": 1, **body}, timeout=60
    )
    assert done.status_code == 200, done.text
    return done.json()["choices"][0]


def special_of(lm):
    """A special token that ends nothing."""
    stops = lm.request("a").stop_tokens
    return min(lm.tokenizer.silent - stops)


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_are_text_if_requested(address, lm, stream):
    token = special_of(lm)
    body = {"prompt": "Once upon", "max_tokens": 3, "logit_bias": {str(token): 100}}
    name = lm.tokenizer.token(token)
    assert name
    assert send(address, "completions", **body)["text"] == ""
    body |= {"skip_special_tokens": False}
    if not stream:
        found = send(address, "completions", **body, logprobs=1)
        assert found["text"].replace(" ", "") == 3 * name
        assert found["logprobs"]["tokens"] == 3 * [name]
        assert found["logprobs"]["text_offset"] == [0, len(name), 2 * len(name)]
        return
    done = httpx.post(f"{address}/v1/completions", json=body | {"stream": True}, timeout=60)
    assert done.text.replace(" ", "").count(name) == 3


def test_python_takes_the_same(lm):
    token = special_of(lm)
    options = {"max_new_tokens": 3, "controls": f"logit_bias={token}=100"}
    assert lm.generate("Once", **options).text == ""
    kept = lm.generate("Once", keep_special=True, **options)
    assert kept.text.replace(" ", "") == 3 * lm.tokenizer.token(token)
    plain = lm.generate("Once upon a time", max_new_tokens=30)
    same = lm.generate("Once upon a time", max_new_tokens=30, keep_special=True)
    assert (same.text, same.tokens) == (plain.text, plain.tokens)


def test_prompts_begin_as_requested(address, lm):
    text = "Once upon a time"
    for special in (True, False):
        found = send(address, "completions", prompt=text, max_tokens=9, echo=True, logprobs=0,
                     add_special_tokens=special, return_token_ids=True)  # fmt: skip
        ids = lm.tokenizer.encode(text, special=special)
        assert found["prompt_token_ids"] == ids
        asked = send(address, "completions", prompt=ids, max_tokens=9)
        assert found["text"].endswith(asked["text"])
        assert len(found["logprobs"]["tokens"]) == len(ids) + 9
    assert lm.tokenizer.encode(text) != lm.tokenizer.encode(text, special=False)


def test_a_conversation_has_those_of_its_template(address):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    texts = {
        send(address, "chat/completions", **body, **more)["message"]["content"]
        for more in ({}, {"add_special_tokens": False}, {"skip_special_tokens": True})
    }
    assert len(texts) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_of_users_are_text_if_requested(address, lm, chat):
    token = special_of(lm)
    text = f"Once {lm.tokenizer.token(token)} upon"
    path = "chat/completions" if chat else "completions"
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body |= {"max_tokens": 1, "return_token_ids": True, "seed": 1}
    counts = []
    for split in (False, True):
        sent = {**body, "split_special_tokens": split}
        done = httpx.post(f"{address}/v1/{path}", json=sent, timeout=60)
        assert done.status_code == 200, done.text
        found = done.json()
        holder = found if "prompt_token_ids" in found else found["choices"][0]
        ids = holder["prompt_token_ids"]
        counts.append(ids.count(token))
        same = {key: body[key] for key in ("messages", "prompt") if key in body}
        tokens = httpx.post(
            f"{address}/tokenize", json={**same, "split_special_tokens": split}, timeout=60
        ).json()["tokens"]
        assert tokens == ids
    assert counts[1] == counts[0] - 1
