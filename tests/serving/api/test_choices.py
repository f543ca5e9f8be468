"""Several answers: compared, or searched for as `LM.search` does."""

import json
import socket

import httpx2 as httpx
import openai
import pytest

from paceline.serving import search_queue
from paceline.serving.batch import BatchSettings, InputLine, run_batch
from paceline.serving.worker import Worker
from tests.serving.api.test_leaving import raw, until
from tests.serving.api.test_openai import OPENING, TALK, alone

COLD = {"model": "tiny", "prompt": OPENING, "max_tokens": 8}


def searched(lm, strategy, prompt=OPENING, **options):
    return [each.text for each in lm.search(prompt, strategy, max_new_tokens=8, **options)]


@pytest.mark.parametrize(
    ("body", "strategy"),
    [
        ({"use_beam_search": True}, "beam"),
        ({"use_beam_search": True, "n": 3}, "beam:width=4,returned=3"),
        ({"use_beam_search": True, "n": 5}, "beam:width=5,returned=5"),
        (
            {"use_beam_search": True, "n": 2, "best_of": 6, "length_penalty": 0.2},
            "beam:width=6,returned=2,length_penalty=0.2",
        ),
        ({"use_beam_search": True, "early_stopping": True}, "beam:early_stopping=true"),
        ({"use_beam_search": True, "early_stopping": "never"}, "beam:early_stopping=never"),
        ({"strategy": "diverse:width=6,groups=3"}, "diverse:width=6,groups=3"),
        ({"strategy": "contrastive:k=3"}, "contrastive:k=3"),
    ],
)
def test_a_search_finds_what_it_finds_alone(client, lm, body, strategy):
    found = client.post("/completions", body=COLD | body, cast_to=openai.types.Completion)
    assert [choice.text for choice in found.choices] == searched(lm, strategy)
    assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
    tokens = lm.search(OPENING, strategy, max_new_tokens=8)
    assert found.usage.completion_tokens == sum(len(each.tokens) for each in tokens)
    assert found.usage.prompt_tokens == len(lm.tokenizer.encode(OPENING))
    assert found.paceline["passes"] == tokens[0].passes


def test_searches_follow_controls_grammars_and_conversations(client, lm):
    found = client.chat.completions.create(
        model="tiny",
        messages=TALK,
        max_tokens=8,
        n=2,
        stop=["."],
        temperature=0.0,
        extra_body={"use_beam_search": True, "no_repeat_ngram_size": 2},
    )
    options = {"controls": "no_repeat_ngram=2", "stop": ["."], "temperature": 0.0}
    expected = searched(lm, "beam:returned=2", TALK, **options)
    assert [choice.message.content for choice in found.choices] == expected
    body = {"use_beam_search": True, "guided_choice": ["yes", "no"]}
    found = client.completions.create(model="tiny", prompt=OPENING, n=3, extra_body=body)
    texts = [choice.text for choice in found.choices]
    assert sorted(texts) == ["no", "yes"]  # there is no third
    assert {choice.finish_reason for choice in found.choices} == {"stop"}


def test_a_prompt_each(client, lm):
    prompts = [OPENING, "The sea"]
    body = COLD | {"prompt": prompts, "use_beam_search": True, "n": 2}
    found = client.post("/completions", body=body, cast_to=openai.types.Completion)
    expected = [text for p in prompts for text in searched(lm, "beam:returned=2", p)]
    assert [choice.text for choice in found.choices] == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stream": True}, "use_beam_search returns its results at the end only; leave stream out"),
        ({"logprobs": 0}, "use_beam_search reports no logprobs; leave logprobs out"),
        ({"speculation": {}}, "leave speculation out"),
        ({"prediction": {"content": "a"}}, "leave prediction out"),
        ({"temperature": 0.7}, "the strategy draws nothing"),
        ({"best_of": 2, "n": 3}, "best_of is 2, expected n = 3 or more"),
        ({"best_of": 128, "prompt": ["a", "b"]}, "2 prompts with 128 answers each exceed"),
        ({"strategy": "beam"}, "leave use_beam_search out"),
        ({"sampler": "mirostat=3"}, "leave the control out"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty needs use_beam_search"),
        ({"use_beam_search": None, "strategy": "beam:width=200"}, "200 answers each exceed"),
        ({"use_beam_search": None, "strategy": "lattice"}, "lattice is not available over the API"),
        ({"use_beam_search": None, "strategy": "planning:tests=/etc/passwd"}, "is not available"),
        ({"use_beam_search": None, "strategy": "best_of:n=3"}, "best_of is a separate field"),
        ({"use_beam_search": None, "strategy": "beam", "n": 2}, "leave n out"),
        ({"use_beam_search": None, "stream_options": {}}, "stream_options needs stream: true"),
        (
            {"use_beam_search": None, "best_of": 2, "temperature": 0},
            "the best of 2 answers and temperature 0",
        ),
    ],
)
def test_what_cannot_be_searched_is_told_in_a_sentence(client, change, said):
    body = COLD | {"use_beam_search": True} | change
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.post("/completions", body=body, cast_to=object)
    assert caught.value.type == "invalid_request_error"


def test_the_likeliest_turns_of_a_conversation(client, lm):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 6, "temperature": 1.5, "seed": 1}
    every = client.chat.completions.create(**options, n=5, logprobs=True).choices
    mean = {}
    for place, choice in enumerate(every):
        reported = [each.logprob for each in choice.logprobs.content]
        text = alone(lm, TALK, max_new_tokens=6, temperature=1.5, seed=1 + place)
        assert choice.message.content == text
        mean[text] = sum(reported) / len(reported)
    best = client.chat.completions.create(**options, n=2, extra_body={"best_of": 5}).choices
    texts = [choice.message.content for choice in best]
    assert texts == sorted(mean, key=mean.get, reverse=True)[:2]
    assert [(choice.index, choice.logprobs) for choice in best] == [(0, None), (1, None)]


def test_who_leaves_ends_the_search(address, service, monkeypatch):
    step, steps = search_queue._QueuedSearch.step, []

    def halted(search):
        """After three passes it goes on only to leave."""
        steps.append(search)
        return step(search) if len(steps) < 4 or search._leaving else False

    monkeypatch.setattr(search_queue._QueuedSearch, "step", halted)
    body = COLD | {"max_tokens": 400, "use_beam_search": True, "ignore_eos": True}
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as leaving:
        leaving.sendall(raw("/v1/completions", body))
        until(lambda: len(steps) > 4)
    until(lambda: service.worker.searches.idle and service.idle)
    used = httpx.post(f"{address}/v1/completions", json=COLD | {"temperature": 0.0})
    assert used.status_code == 200


def test_a_batch_searches_too(lm):
    rows = [
        COLD | {"use_beam_search": True, "n": 2},
        COLD | {"temperature": 0.0},
        {"messages": TALK, "max_tokens": 8, "strategy": "beam:width=2"},
    ]
    worker = Worker(lm, queue=10**6)
    lines = [InputLine(place, json.dumps(row).encode()) for place, row in enumerate(rows, 1)]
    found = [
        line["response"]["body"] for _, line in run_batch(worker, lines, BatchSettings("tiny"))
    ]
    worker.close()
    texts = [[c.get("text") or c["message"]["content"] for c in each["choices"]] for each in found]
    assert texts[0] == searched(lm, "beam:returned=2")
    assert texts[1] == [alone(lm, OPENING, max_new_tokens=8, temperature=0.0)]
    assert texts[2] == searched(lm, "beam:width=2", TALK)
    assert found[0]["usage"]["completion_tokens"] == 16
