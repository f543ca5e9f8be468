"""Documents in the bodies of the server's endpoints."""

import httpx2 as httpx
import openai
import pytest

TEXTS = ["Tom had a big red ball. He liked it.", "Lily had a black cat named Max."]
FORMS = [TEXTS[0], {"text": TEXTS[1], "title": "Lily"}]


def counts(address):
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    names = ("memory_hits_total", "misses_total")
    return [
        float(line.split()[-1])
        for name in names
        for line in lines
        if line.startswith(f"paceline_chunk_cache_{name} ")
    ]


def test_a_chat_gets_documents_that_are_computed_once(client, lm, address) -> None:
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    hits, misses = counts(address)
    found = [
        client.chat.completions.create(
            **body,
            messages=[{"role": "user", "content": text}],
            extra_body={"documents": FORMS, "recompute": 0.1},
        )
        for text in ("Who?", "Where?")
    ]
    options = {"documents": FORMS, "recompute": 0.1, "max_new_tokens": 8, "temperature": 0}
    expected = lm.chat([{"role": "user", "content": "Who?"}], **options)
    assert found[0].choices[0].message.content == expected.text
    request = lm.request([{"role": "user", "content": "Who?"}], **options)
    assert found[0].usage.prompt_tokens == len(request.prompt)
    assert found[1].usage.prompt_tokens_details.cached_tokens == sum(request.documents.sizes)
    assert counts(address) == [hits + 4, misses + 2]  # two of them of `expected`


def test_completions_and_responses_take_them_too(client, lm) -> None:
    options = {"documents": FORMS, "max_new_tokens": 8, "temperature": 0}
    body = {"model": "tiny", "temperature": 0, "extra_body": {"documents": FORMS}}
    [choice] = client.completions.create(prompt="Once", max_tokens=8, **body).choices
    assert choice.text == lm.generate("Once", **options).text
    said = client.responses.create(input="Who?", max_output_tokens=8, **body).output_text
    assert said == lm.chat([{"role": "user", "content": "Who?"}], **options).text


def test_documents_of_text_in_anthropics_messages(address, lm) -> None:
    blocks = [
        {
            "type": "document",
            "title": "Lily",
            "source": {"type": "text", "media_type": "text/plain", "data": TEXTS[1]},
        },
        {"type": "text", "text": "Who?"},
    ]
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    body["messages"] = [{"role": "user", "content": blocks}]
    found = httpx.post(f"{address}/v1/messages", json=body).json()
    options = {"documents": FORMS[1:], "max_new_tokens": 8, "temperature": 0}
    expected = lm.chat([{"role": "user", "content": "Who?"}], **options)
    assert found["content"][0]["text"] == expected.text
    blocks[0]["source"] = {"type": "base64", "media_type": "application/pdf", "data": "aaaa"}
    refused = httpx.post(f"{address}/v1/messages", json=body)
    assert refused.status_code == 400
    assert "no documents" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"documents": "text"}, "documents"),
        ({"documents": [3]}, "documents"),
        ({"documents": [{"title": "a"}]}, "text"),
        ({"documents": [{"text": "a", "url": "b"}]}, "url"),
        ({"documents": [""]}, "document 1 is empty"),
        ({"documents": ["a"] * 300}, "256"),
        ({"documents": ["a " * 40_000]}, "document 1 has"),
        ({"documents": ["a"], "recompute": 2}, "recompute"),
        ({"recompute": 0.5}, "there are none"),
        ({"documents": ["a"], "prompt_logprobs": 1}, "do not go together"),
        ({"documents": ["a"], "strategy": "beam:width=2"}, "do not go together"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(client, more, words) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="Once", max_tokens=4, extra_body=more)
    message = caught.value.body["message"]
    assert words in message
    assert "\n" not in message
