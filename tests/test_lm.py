import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paceline
from paceline import registry
from paceline.deprecated import Completion
from paceline.errors import MethodError, ModelError, RequestError
from paceline.lm import LM
from paceline.models.chat import ChatTemplate
from paceline.request_options import _CHECKS, _DEFAULTS, RequestOptions
from tests.conftest import shared
from tests.measuring.toy_lm import ToyLM

PROMPTS = ["Once upon a time", "The dog", "Lily and Tom", "One day, a cat"]


@pytest.fixture(scope="module")
def lm():
    with LM(shared("models", "stories260K"), budget=6, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def chat_lm():
    with LM(shared("models", "tinystories-instruct-3m-chat"), drafter="plain", budget=0) as opened:
        opened.tokenizer.template = ChatTemplate(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}Answer: "
        )
        yield opened


# ------------------------------------------------------------------------------------ options


def test_every_option_is_checked_documented_and_named_once():
    options = set(get_type_hints(RequestOptions))
    samplers = options - set(_DEFAULTS)
    assert set(_CHECKS) == set(_DEFAULTS)
    assert set(_DEFAULTS) < options
    assert samplers < set(registry.controls.methods())
    text = inspect.getdoc(RequestOptions)
    assert all(f"    {name}: " in text for name in options)


def test_prompts_are_texts_or_tokens():
    lm = ToyLM()
    assert lm.request("ab").prompt == lm.request(lm.tokenizer.encode("ab")).prompt
    assert lm.request(np.array([1, 2])).prompt == (1, 2)


def test_two_temperatures_must_agree():
    lm = ToyLM()
    assert lm.request("a", controls="temperature=0.5").temperature == 0.5
    assert lm.request("a", controls="temperature=0.5", temperature=0.5).temperature == 0.5
    with pytest.raises(RequestError, match=r"temperature is 0\.6 and 0\.5"):
        lm.request("a", controls="temperature=0.5", temperature=0.6)


def test_a_prediction_needs_a_drafter_that_follows_it():
    with pytest.raises(
        RequestError, match="a prediction and the drafter oracle do not go together"
    ):
        ToyLM().request("a", prediction="b")


def test_samplers_by_name_are_the_controls_of_that_name(lm):
    options = {"temperature": 0.9, "seed": 5, "max_new_tokens": 30}
    named = lm.generate(PROMPTS[0], top_p=0.8, top_k=20, repetition_penalty=1.1, **options)
    text = "top_p=0.8,top_k=20,repetition_penalty=1.1"
    assert named.tokens == lm.generate(PROMPTS[0], controls=text, **options).tokens
    assert named.tokens != lm.generate(PROMPTS[0], **options).tokens


def test_a_sampler_by_name_replaces_the_default_of_that_name_only(lm, monkeypatch):
    defaults = {"top_k": 5, "repetition_penalty": 1.2}
    monkeypatch.setattr(type(lm.model.defaults), "samplers", lambda self: dict(defaults))

    def kinds(**options):
        return {
            type(each).__name__ for each in lm.request("a", temperature=0.0, **options).controls
        }

    assert kinds() == {"TopK", "RepetitionPenalty"}
    assert kinds(top_p=0.9) == {"TopK", "RepetitionPenalty", "TopP"}
    assert kinds(top_k=0) == {"RepetitionPenalty"}
    assert kinds(top_k=None) == kinds()
    assert kinds(controls={}, top_p=0.9) == {"TopP"}
    assert kinds(controls="top_p=0.9") == kinds(controls={"top_p": 0.9}) == kinds(top_p=0.9)
    assert kinds(controls="top_k=3") == kinds()
    assert lm.request("a", top_k=7).controls[-1].k == 7
    greedy = lm.request_builder.without_sampling({"repetition_penalty": 1.5})
    assert [each.penalty for each in lm.request("a", **greedy).controls] == [1.5]
    with pytest.raises(MethodError, match="top_p is given twice"):
        lm.request("a", controls="top_p=0.5", top_p=0.9)


def test_stop_is_one_string_or_several(lm):
    whole = lm.generate(PROMPTS[0], max_new_tokens=40).text
    assert "little" in whole
    for stop in ("little", ["little"], ["nowhere", "little"]):
        output = lm.generate(PROMPTS[0], max_new_tokens=40, stop=stop)
        assert output.finish == "stop"
        assert output.text == whole.partition("little")[0]


def test_a_kv_policy_is_an_option(lm):
    text = "Once upon a time, there was a little girl who had a dog and a cat"
    options = {"max_new_tokens": 60, "temperature": 0.0}
    policy = "sliding_window:budget=24,sinks=2,every=8"
    limited = lm.generate(text, kv_policy=policy, **options)
    assert limited.tokens != lm.generate(text, **options).tokens
    assert (
        limited.tokens
        == lm.generate(
            text, kv_policy=lm.request("a", kv_policy=policy).kv_policy, **options
        ).tokens
    )
    assert [each.tokens for each in lm.generate([text] * 2, kv_policy=policy, **options)] == [
        limited.tokens
    ] * 2
    with pytest.raises(MethodError, match="unknown kv policy 'slide'"):
        lm.generate(text, kv_policy="slide")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_pp": 0.9}, "unknown option 'top_pp'; did you mean top_p"),
        ({"max_tokens": 3}, "did you mean max_new_tokens"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3', expected an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"top_k": 10**5000}, "top_k is an integer of more than 64 bits"),
        ({"stop": b"x"}, "stop is a bytes, expected text"),
        ({"ignore_eos": "yes"}, "ignore_eos is 'yes', expected True or False"),
        ({"controls": [3]}, "an item of controls is 3, expected a control"),
        ({"guide": 3}, "guide is 3"),
        ({"guide": ""}, "unknown guide ''"),
        ({"guide": [""]}, "unknown guide ''"),
        ({"tools": 3}, "tools is 3, expected a list of functions"),
        ({"bad_words": ["\ud800"]}, "lone surrogate"),
    ],
)
def test_options_that_cannot_be_are_refused(lm, options, said):
    for call in (lm.generate, lm.stream, lm.request):
        with pytest.raises((RequestError, MethodError), match=said):
            call("Once", **options)


# ------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 3, "top_p": 0.9},
        {"temperature": 1.0, "seed": 1, "grammar": r"start: /[a-z ,.]+/", "frequency_penalty": 0.5},
        {"guide": "cfg:negative=A sad dog", "temperature": 0.0},
    ],
)
def test_a_list_gives_what_each_prompt_gives_alone(lm, options):
    options = options | {"max_new_tokens": 25}
    prompts = [*PROMPTS, lm.encode("Then")] * 8  # more than run at once
    alone = {str(prompt): lm.generate(prompt, **options) for prompt in prompts}
    limit = lm.engine.kv_limit
    for prompt, output in zip(prompts, lm.generate(prompts, **options), strict=True):
        expected = alone[str(prompt)]
        assert output.tokens == expected.tokens
        assert (output.text, output.finish) == (expected.text, expected.finish)
    assert lm.engine.kv_limit == limit
    assert lm.engine.memory.used == 0


def test_a_list_is_one_batch(lm, monkeypatch):
    sizes = []
    forward = lm.engine.forward

    def counted(batch, *rest, **options):
        sizes.append(len(batch))
        return forward(batch, *rest, **options)

    monkeypatch.setattr(lm.engine, "forward", counted)
    lm.generate(PROMPTS, max_new_tokens=10, temperature=0.0)
    assert max(sizes) == len(PROMPTS)


def test_an_interrupted_list_keeps_what_there_is(lm, monkeypatch):
    lm.generate(PROMPTS, max_new_tokens=2)  # measures the cost of passes, once
    calls = []
    forward = lm.engine.forward

    def interrupting(batch, *rest, **options):
        calls.append(batch)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(batch, *rest, **options)

    monkeypatch.setattr(lm.engine, "forward", interrupting)
    outputs = lm.generate(PROMPTS, max_new_tokens=100, ignore_eos=True)
    assert {output.finish for output in outputs} == {"interrupted"}
    assert all(0 < len(output.tokens) < 100 for output in outputs)
    assert lm.engine.memory.used == 0


def test_an_ensemble_takes_a_list_too():
    path = shared("models", "stories260K")
    with LM(f"{path}@0.5|{path}@0.5", drafter="plain", budget=0, threads=1) as both:
        outputs = both.generate(PROMPTS[:2], max_new_tokens=5)
        assert [each.tokens for each in outputs] == [
            both.generate(prompt, max_new_tokens=5).tokens for prompt in PROMPTS[:2]
        ]


def test_a_list_with_a_prompt_that_cannot_be_runs_none(lm):
    with pytest.raises(RequestError, match="the model sees 512"):
        lm.generate([PROMPTS[0], [1] * 600], max_new_tokens=5)
    assert lm.engine.memory.used == 0


def test_stream_takes_a_prompt_or_a_request(lm):
    output = lm.generate("Once", max_new_tokens=12)
    pieces = list(lm.stream("Once", max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == output.text
    assert "".join(lm.stream(lm.request("Once", max_new_tokens=12))) == output.text
    with pytest.raises(RequestError, match="has its options already"):
        lm.stream(lm.request("Once"), top_p=0.5)


def test_chat_answers_messages(chat_lm):
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    output = chat_lm.chat(messages, max_new_tokens=20)
    assert output.tokens == chat_lm.generate(messages, max_new_tokens=20).tokens
    assert output.text
    both = chat_lm.generate([messages, messages], max_new_tokens=20)
    assert [each.tokens for each in both] == [output.tokens] * 2


@pytest.mark.parametrize("messages", ["Hi", [], [3], [{}], [{"role": 3}], None, {"role": "user"}])
def test_messages_that_are_none_are_refused(chat_lm, messages):
    with pytest.raises(RequestError, match="expected"):
        chat_lm.chat(messages)


def test_a_chat_needs_a_template(lm):
    with pytest.raises(RequestError, match="no chat template"):
        lm.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "name", sorted(set(registry.strategies.methods()) - {"planning", "best_of"})
)
def test_every_strategy_is_a_search(lm, name):
    outputs = lm.search("Once upon", name, max_new_tokens=6, ignore_eos=True)
    assert all(len(output.tokens) == 6 and output.text for output in outputs)
    best = lm.generate("Once upon", strategy=name, max_new_tokens=6, ignore_eos=True)
    assert best.tokens == outputs[0].tokens
    several = lm.generate(["Once upon"] * 2, strategy=name, max_new_tokens=6, ignore_eos=True)
    assert [each.tokens for each in several] == [best.tokens] * 2


def test_superposed_finds_what_complete_did(lm):
    outputs = lm.search("Once upon", "superposed:width=4,returned=4", max_new_tokens=8)
    with pytest.warns(DeprecationWarning, match=r"LM\.search"):
        old = lm.complete("Once upon", 4, max_new_tokens=8, method="superposed")
    assert old == [Completion(each.text, each.score, tuple(each.tokens)) for each in outputs]
    with pytest.raises(MethodError, match="leave them out, or take beam"):
        lm.search("Once upon", "superposed", top_p=0.5)


# ------------------------------------------------------------------------------------ text, scores


def test_texts_become_tokens_and_back(lm):
    tokens = lm.encode("Once upon a time")
    assert tokens == lm.tokenizer.encode("Once upon a time")
    assert lm.decode(tokens) == lm.decode(np.array(tokens)) == "Once upon a time"
    with pytest.raises(RequestError, match="token 512 is outside the vocabulary of 512"):
        lm.decode([512])


@pytest.fixture(scope="module")
def reference():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    with LM(shared("models", "stories260K"), engine="reference", drafter="plain", budget=0) as lm:
        yield lm


@settings(max_examples=15)
@given(text=st.text("abcdefg .,TLM\n", max_size=300))
def test_scores_are_torchs_log_softmax(lm, reference, text):
    import torch

    score = lm.score(text)
    assert score == lm.score([text])[0]
    assert list(score.tokens) == lm.encode(text)
    assert score.logprobs[0] is None
    rows = []
    tokens = np.array(score.tokens, np.int32)
    engine = reference.engine
    engine.release(engine.start(tokens, lambda _, __, logits: rows.append(torch.tensor(logits))))
    logs = torch.log_softmax(torch.cat(rows).double(), -1)
    expected = [float(logs[i, token]) for i, token in enumerate(score.tokens[1:])]
    np.testing.assert_allclose(score.logprobs[1:], expected, atol=2e-3)
    assert score.total == pytest.approx(sum(expected), abs=2e-3 * max(len(expected), 1))


def test_a_score_is_the_probability_of_what_greedy_decoding_draws(lm):
    output = lm.generate("Once", max_new_tokens=3, temperature=0.0)
    text = "Once" + output.text
    assert lm.score(text).total > lm.score("Once zebra of zinc").total
    with pytest.raises(RequestError, match="the model sees 512"):
        lm.score("a b " * 600)
    assert lm.engine.memory.used == 0


# ------------------------------------------------------------------------------------ tools


def weather(city: Literal["Paris", "Rome"], warm: Annotated[bool, "as it was"] = True) -> str:
    """Tell the weather.

    Args:
        city: its name.
    """
    return f"{city} {warm}"


def test_python_functions_are_tools(chat_lm):
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    options = {"tool_choice": "weather", "max_new_tokens": 80, "temperature": 0.0}
    output = chat_lm.chat(messages, tools=[weather], **options)
    [call] = output.tool_calls
    assert call.name == "weather"
    assert {"weather": weather}[call.name](**call.arguments).partition(" ")[0] in ("Paris", "Rome")
    schema = {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"], "description": "its name."},
                "warm": {"type": "boolean", "description": "as it was"},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    assert chat_lm.chat(messages, tools=[schema], **options).tokens == output.tokens


# ------------------------------------------------------------------------------------ lifetime


@pytest.mark.parametrize("drafter", ["recycle", "layer_skip:skip=1+2"])
def test_threads_take_turns(drafter):
    """The engine and the drafter serve one pass, or one list, at a time."""
    prompts = ("Once upon a time", "Tom had a dog", "The")
    options = {"max_new_tokens": 40, "temperature": 0.8, "seed": 3}
    with LM(shared("models", "stories260K"), drafter=drafter, budget=6, threads=1) as shared_lm:
        expected = [shared_lm.generate(prompt, **options).tokens for prompt in prompts]

        def work(place: int) -> list[list[int]]:
            if place % 4 == 3:
                return [output.tokens for output in shared_lm.generate(list(prompts), **options)]
            return [shared_lm.generate(prompt, **options).tokens for prompt in prompts]

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(12)))
        assert results == [expected] * 12
        assert shared_lm.engine.memory.used == 0


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model"])
def test_a_name_that_no_folder_can_have_is_refused(name):
    with pytest.raises(ModelError, match="cannot be opened"):
        LM(name)


def test_a_closed_model_gives_its_memory_back_and_says_so():
    with LM(shared("models", "stories260K"), drafter="blend", threads=1) as lm:
        lm.generate("Once", guide="cfg:negative=No", max_new_tokens=4)
        lm.generate(["Once", "Then"], max_new_tokens=4)
        engine, drafter = weakref.ref(lm.engine), weakref.ref(lm.drafter)
    gc.collect()
    assert engine() is None
    assert drafter() is None
    assert repr(lm) == "LM(closed)"
    lm.close()
    for call in (lambda: lm.generate("a"), lambda: lm.encode("a"), lambda: lm.engine, lm.reset):
        with pytest.raises(RequestError, match="this model is closed; open it again"):
            call()


def test_an_attribute_that_is_not_there_is_named(lm):
    with pytest.raises(AttributeError, match="no attribute 'engin'"):
        _ = lm.engin


def test_repr_tells_what_runs(lm):
    expected = (
        "LM('stories260K', dtype='fp32', engine='native', threads=1, drafter='blend', budget=6)"
    )
    assert repr(lm) == expected


def test_an_output_prints_its_text(lm):
    output = lm.generate("Once", max_new_tokens=5)
    assert str(output) == f"{output}" == output.text
    assert repr(output).startswith(f"Output({output.text!r}, 5 tokens, finish='length', ")
    assert repr(lm.search("Once", "beam", max_new_tokens=5)[0]).startswith("SearchOutput(")


def test_dtype_is_the_format_of_the_weights():
    path = shared("models", "stories260K")
    with LM(path, dtype="int8", drafter="plain", budget=0) as lm:
        assert lm.engine.format == "int8"
    with pytest.warns(DeprecationWarning, match="dtype"), LM(path, format="int8", budget=0) as lm:
        assert lm.engine.format == "int8"
    with pytest.raises(MethodError, match="both given"):
        LM(path, dtype="int8", format="int8")
    with pytest.raises(MethodError, match="unknown argument of LM 'dtpe'; did you mean dtype"):
        LM(path, dtpe="int8")


def test_the_package_has_the_model():
    assert paceline.LM is LM
