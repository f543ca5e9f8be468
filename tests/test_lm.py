import inspect
from typing import get_type_hints

import pytest

from paceline.errors import RequestError
from paceline.request_builder import RequestBuilder, RequestOptions
from tests.measuring.toy_lm import ToyLM


def test_options_parameters_and_docstring_of_a_request_are_the_same():
    parameters = inspect.signature(RequestBuilder.build).parameters
    assert set(get_type_hints(RequestOptions)) == set(parameters) - {"self", "prompt"}
    text = inspect.getdoc(RequestBuilder.build)
    assert all(f"    {name}: " in text for name in parameters if name != "self")
    required = [name for name, one in parameters.items() if one.default is one.empty]
    assert required == ["self", "prompt"]


def test_prompts_are_texts_or_tokens():
    lm = ToyLM()
    assert lm.request("ab").prompt == lm.request(lm.tokenizer.encode("ab")).prompt


def test_two_temperatures_must_agree():
    lm = ToyLM()
    assert lm.request("a", controls="temperature=0.5").temperature == 0.5
    assert lm.request("a", controls="temperature=0.5", temperature=0.5).temperature == 0.5
    with pytest.raises(RequestError, match=r"temperature is 0\.6 and 0\.5"):
        lm.request("a", controls="temperature=0.5", temperature=0.6)


def test_a_prediction_needs_a_drafter_that_follows_it():
    with pytest.raises(RequestError, match="oracle has no use for a prediction"):
        ToyLM().request("a", prediction="b")
