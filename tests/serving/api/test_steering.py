"""Watermarks and guides over the API: each answer is that of `LM.generate` with the same seed."""

import logging
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

import paceline
from paceline.serving.api import create_app
from paceline.serving.api.middleware import Rules
from paceline.serving.api.parse import RequestLimits
from paceline.serving.logs import JsonFormatter
from paceline.serving.operator_policy import OperatorPolicy, open_guides, parse_guides
from paceline.watermarks.base import parse_watermark
from tests.serving.api.conftest import served
from tests.serving.api.test_leaving import until
from tests.serving.api.test_openai import OPENING, TALK, alone

EMBEDDED = Path(paceline.__file__).parent / "embedded"
GUIDES = {
    "kind": f"gedi:model={EMBEDDED},positive=happy,negative=sad,omega=5",
    "calm": "cfg:negative=A sad dog,scale=2",
    "late": f"contrastive:amateur={EMBEDDED},beta=1",
}
MARKS = [
    "key=mine",
    "key=mine,kind=inverse",
    "key=mine,kind=green,delta=4",
    "key=mine,kind=synthid",
]
HOT = {"temperature": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def ask(lm, service):
    """Clients of servers that mark and steer."""
    before = list(service.observers)
    methods = parse_guides(f"{name}={guide}" for name, guide in GUIDES.items())
    open_guides(lm, methods)
    steerings = {
        "marked": OperatorPolicy(parse_watermark("key=ours,kind=green,delta=4")),
        "noisy": OperatorPolicy(parse_watermark("key=ours,length=40")),
        "free": OperatorPolicy(parse_watermark("key=ours"), True, methods),
    }
    with ExitStack() as stack:
        found = {}
        for name, steering in steerings.items():
            app = create_app(service, "tiny", RequestLimits(steering=steering))
            url = f"{stack.enter_context(served(app))}/v1"
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            found[name] = stack.enter_context(client)
        yield found
    service.observers[:] = before


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("drafter", ["plain", "recycle", "blend"])
def test_a_marked_answer_is_that_of_generate(ask, lm, mark, drafter):
    body = {"watermark": mark, "speculation": {"drafter": drafter, "budget": 6}}
    found = ask["free"].completions.create(
        model="tiny", prompt=OPENING, max_tokens=30, n=2, **HOT, extra_body=body
    )
    texts = [choice.text for choice in found.choices]
    expected = [
        lm.generate(OPENING, max_new_tokens=30, temperature=1.0, seed=seed, watermark=mark)
        for seed in (7, 8)
    ]
    assert texts == [each.text for each in expected]
    assert texts[0] != alone(lm, OPENING, max_new_tokens=30, **HOT)


def test_the_servers_watermark_is_in_every_kind_of_answer(ask, lm):
    mark = "key=ours,kind=green,delta=4"
    client, options = ask["marked"], {"model": "tiny", **HOT}
    expected = alone(lm, TALK, max_new_tokens=40, watermark=mark, **HOT)
    said = client.chat.completions.create(messages=TALK, max_tokens=40, **options)
    assert said.choices[0].message.content == expected
    pieces = client.chat.completions.create(messages=TALK, max_tokens=40, stream=True, **options)
    text = "".join(choice.delta.content or "" for p in pieces for choice in p.choices)
    assert text == expected
    found = client.responses.create(
        model="tiny",
        input=TALK[0]["content"],
        max_output_tokens=40,
        temperature=1.0,
        extra_body={"seed": 7},
    )
    assert found.output_text == expected
    long = client.completions.create(prompt=OPENING, max_tokens=200, **options).choices[0].text
    tokens = lm.tokenizer.encode(long, special=False)
    assert parse_watermark(mark).detect(tokens).p < 1e-6
    assert parse_watermark(mark.replace("ours", "mine")).detect(tokens).p > 1e-3


def test_a_sequence_bounds_answers_that_name_no_number(ask, lm):
    client = ask["noisy"]
    body = {"ignore_eos": True}
    found = client.completions.create(model="tiny", prompt=OPENING, **HOT, extra_body=body)
    assert found.usage.completion_tokens == 40
    expected = alone(
        lm, OPENING, max_new_tokens=40, ignore_eos=True, watermark="key=ours,length=40", **HOT
    )
    assert found.choices[0].text == expected
    for change, said in (
        ({"max_tokens": 41}, "sequence has 40"),
        ({"temperature": 0.0}, "greedy decoding has none"),
        ({"extra_body": {"watermark": False}}, "this server chooses the watermark"),
        ({"extra_body": {"watermark": "key=a"}}, "this server chooses the watermark"),
    ):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            client.completions.create(**{"model": "tiny", "prompt": OPENING, **HOT, **change})
        assert "ours" not in str(caught.value)


def test_a_request_does_without_where_it_may(ask, lm):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 20, **HOT}
    found = ask["free"].completions.create(**options, extra_body={"watermark": False})
    assert found.choices[0].text == alone(lm, OPENING, max_new_tokens=20, **HOT)
    found = ask["free"].completions.create(**options)
    expected = alone(lm, OPENING, max_new_tokens=20, watermark="key=ours", **HOT)
    assert found.choices[0].text == expected


def test_a_search_is_marked_or_refused(ask, lm):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 12}
    body = {"use_beam_search": True}
    found = ask["marked"].completions.create(**options, extra_body=body)
    mark = "key=ours,kind=green,delta=4"
    [best] = lm.search(OPENING, "beam", max_new_tokens=12, watermark=mark)
    assert found.choices[0].text == best.text
    with pytest.raises(openai.BadRequestError, match="greedy decoding has none"):
        ask["noisy"].completions.create(**options, extra_body=body)


def test_no_key_is_logged(service, caplog):
    caplog.set_level(logging.DEBUG)
    before = list(service.observers)
    steering = OperatorPolicy(parse_watermark("key=s3cret"), choice=True)
    rules = Rules(log_prompts=True)
    with served(create_app(service, "tiny", RequestLimits(steering=steering), rules)) as address:
        body = {"prompt": OPENING, "max_tokens": 4, "temperature": 1.0}
        for change in ({}, {"watermark": "key=s3cret,kind=green"}, {"watermark": "s3cret"}):
            httpx.post(f"{address}/v1/completions", json=body | change)
    service.observers[:] = before
    reported = "".join(JsonFormatter().format(record) for record in caplog.records)
    assert OPENING in reported
    assert "s3cret" not in reported


@pytest.mark.parametrize("name", GUIDES)
def test_a_guided_answer_is_that_of_generate(ask, lm, name):
    body = {"guide": name, "watermark": False}
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 20, **HOT}
    found = ask["free"].completions.create(**options, extra_body=body)
    expected = alone(lm, OPENING, max_new_tokens=20, guide=GUIDES[name], **HOT)
    assert found.choices[0].text == expected
    assert expected != alone(lm, OPENING, max_new_tokens=20, **HOT)


def test_guides_guidance_and_watermarks_go_together(ask, lm):
    body = {
        "guide": ["kind"],
        "guidance": {"negative": 'She said: "No, no."', "scale": 2.0, "stop": 0.05},
        "watermark": "key=mine",
    }
    found = ask["free"].chat.completions.create(
        model="tiny", messages=TALK, max_tokens=20, n=2, **HOT, extra_body=body
    )
    cfg = 'cfg:negative="She said: \\"No\\u002c no.\\"",scale=2,stop=0.05'
    for place, choice in enumerate(found.choices):
        assert choice.message.content == alone(
            lm,
            TALK,
            max_new_tokens=20,
            temperature=1.0,
            seed=7 + place,
            guide=[GUIDES["kind"], cfg],
            watermark="key=mine",
        )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"guide": "kin"}, "guide is 'kin', this server has kind, calm, late"),
        ({"guide": "cleangen:/etc"}, "this server has kind"),
        ({"guide": ["calm", "late"]}, "no order is defined between them"),
        ({"guide": "calm", "guidance": {}}, "no order is defined between them"),
        ({"guidance": {"scale": -1}}, "guidance.scale"),
        ({"guidance": {"negative": "a", "model": "/etc"}}, "guidance.model: is not a parameter"),
        ({"guidance": {"negative": "a " * 3000}}, "a guide sees"),
        ({"watermark": True}, "watermark"),
        ({"watermark": "key"}, "has no value"),
        ({"watermark": "key=a,kind=synthid"}, "hardly differ"),
    ],
)
def test_what_cannot_steer_is_told_in_a_sentence(ask, body, said):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 4, "best_of": 2, **HOT}
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        ask["free"].completions.create(**options, extra_body=body)
    assert caught.value.type == "invalid_request_error"


def test_guides_are_told_in_the_metrics(ask, service, monkeypatch):
    client, before = ask["free"], service.worker.stats.guide

    def reported(name):
        text = httpx.get(f"{client.base_url}".replace("/v1/", "/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return float(values[f"paceline_{name}"])

    held, weigh = [], service._measure_load
    monkeypatch.setattr(
        service, "_measure_load", lambda: (weigh(), held.append(service.load.guides))
    )
    body = {"guide": "kind", "watermark": False}
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 9, **HOT}
    client.completions.create(**options, extra_body=body)
    until(lambda: reported("guide_kv_bytes") == 0)  # it is weighed before the next wait
    assert max(held) > 0
    assert reported("guide_seconds_total") == service.worker.stats.guide > before
