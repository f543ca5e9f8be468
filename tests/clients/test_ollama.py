"""The package `ollama`: `/api/chat`, `/api/generate` and what its clients ask first."""

import pytest

from tests.clients import NOT_HERE
from tests.clients.talk import (
    CALL,
    MESSAGES,
    QUESTION,
    REPORT,
    TALE_MESSAGES,
    TOO_LONG,
    City,
    get_weather,
)

ollama = pytest.importorskip("ollama", reason=NOT_HERE)

OPTIONS = {"temperature": 0, "num_predict": 16}


@pytest.fixture
def client(server):
    return ollama.Client(server.address, headers={"Authorization": f"Bearer {server.key}"})


def test_chat(client, server, plain):
    assert [model.model for model in client.list().models] == [server.model]
    assert client.show(server.model).modelinfo
    found = client.chat(server.model, MESSAGES, options=OPTIONS)
    assert found.message.content == plain(messages=MESSAGES)["content"]
    assert (
        client.generate(server.model, QUESTION, options=OPTIONS).response == found.message.content
    )


def test_stream(client, server, plain):
    pieces = [
        piece.message.content
        for piece in client.chat(server.model, TALE_MESSAGES, stream=True, options=OPTIONS)
    ]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == plain(messages=TALE_MESSAGES)["content"]


def test_structured_output(client, server):
    found = client.chat(
        server.model,
        MESSAGES,
        format=City.model_json_schema(),
        options=OPTIONS | {"num_predict": 60},
    )
    assert City.model_validate_json(found.message.content).name == "Paris"


def test_tools_with_a_round_trip(client, server):
    talk = [{"role": "user", "content": CALL}]
    longer = OPTIONS | {"num_predict": 40}
    found = client.chat(server.model, talk, tools=[get_weather], options=longer)
    [call] = found.message.tool_calls
    assert get_weather(**call.function.arguments) == REPORT
    talk += [found.message, {"role": "tool", "tool_name": call.function.name, "content": REPORT}]
    # Without the tools, or a small model would call again.
    assert client.chat(server.model, talk, options=longer).message.content


def test_errors(client, server):
    with pytest.raises(ollama.ResponseError, match="shorten") as caught:
        client.chat(server.model, [{"role": "user", "content": TOO_LONG}])
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("another", MESSAGES)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as caught:
        ollama.Client(server.address).chat(server.model, MESSAGES)
    assert caught.value.status_code == 401
