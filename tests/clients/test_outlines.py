"""Outlines: its clients of vLLM's and of SGLang's servers."""

import re
from typing import Literal

import openai
import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import MESSAGES, QUESTION, TALE, TALE_MESSAGES, TOO_LONG, City

outlines = pytest.importorskip("outlines", reason=NOT_HERE)


@pytest.fixture(params=["vllm", "sglang"])
def model(request, server):
    client = openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0)
    return getattr(outlines, f"from_{request.param}")(client, server.model)


OPTIONS = {"temperature": 0, "max_tokens": 16}


def test_chat(model, plain):
    assert model(QUESTION, **OPTIONS) == plain(messages=MESSAGES)["content"]


def test_stream(model, plain):
    pieces = list(model.stream(TALE, **OPTIONS))
    assert len(pieces) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_structured_output(model):
    found = model(QUESTION, City, **OPTIONS | {"max_tokens": 60})
    assert City.model_validate_json(found).name == "Paris"
    assert model(QUESTION, Literal["yes", "no"], **OPTIONS) in ("yes", "no")
    assert re.fullmatch("[0-9]{3}", model(QUESTION, outlines.types.Regex("[0-9]{3}"), **OPTIONS))


def test_errors(model):
    with pytest.raises(Exception, match="shorten"):
        model(TOO_LONG)
