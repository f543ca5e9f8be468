"""vLLM's `prompt_logprobs`: those of `LM.score`, for completions and chat."""

import httpx2 as httpx
import numpy as np
import pytest

TALK = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture
def post(address):
    def send(path, **body):
        return httpx.post(f"{address}/v1{path}", json={"max_tokens": 2, **body}, timeout=60)

    return send


def values(entries, tokens):
    assert entries[0] is None
    assert len(entries) == len(tokens)
    pairs = zip(entries[1:], tokens[1:], strict=True)
    return [entry[str(token)]["logprob"] for entry, token in pairs]


def test_each_prompt_of_a_completion_has_its_scores(post, lm):
    prompts = ["Once upon a time", "The sea was  blue"]
    found = post("/completions", prompt=prompts, prompt_logprobs=3, n=2).json()
    assert len(found["choices"]) == 4
    for index, choice in enumerate(found["choices"]):
        score = lm.score(prompts[index // 2])
        entries = choice["prompt_logprobs"]
        assert values(entries, score.tokens) == pytest.approx(score.logprobs[1:], abs=1e-5)
        for token, entry in zip(score.tokens[1:], entries[1:], strict=True):
            assert len(entry) in (3, 4)
            ranks = {each["rank"]: each["logprob"] for each in entry.values()}
            assert {1, 2, 3} <= set(ranks)
            assert [ranks[rank] for rank in sorted(ranks)] == sorted(ranks.values(), reverse=True)
            assert entry[str(token)]["decoded_token"]


def test_a_rank_counts_the_more_likely_tokens(post, lm):
    found = post("/completions", prompt="He said: x", prompt_logprobs=0).json()
    tokens = lm.encode("He said: x")
    sequence = lm.engine.start(np.array(tokens[:-1], np.int32))
    lm.engine.release(sequence)
    rows = []
    lm.engine.release(
        lm.engine.start(
            np.array(tokens[:-1], np.int32), lambda o, t, logits: rows.append(logits + 0)
        )
    )
    logits = np.concatenate(rows)
    for entry, token, row in zip(
        found["choices"][0]["prompt_logprobs"][1:], tokens[1:], logits, strict=True
    ):
        assert list(entry) == [str(token)]
        assert entry[str(token)]["rank"] == 1 + (row > row[token]).sum()


def test_echo_has_as_many_likely_tokens_as_logprobs_says(post):
    body = {"prompt": "Once upon", "echo": True, "logprobs": 1, "prompt_logprobs": 4}
    choice = post("/completions", **body).json()["choices"][0]
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(len(entry) >= 4 for entry in choice["prompt_logprobs"][1:])


def test_nothing_but_the_scores(post, lm):
    found = post("/completions", prompt="Once upon", prompt_logprobs=1, max_tokens=0).json()
    (choice,) = found["choices"]
    assert choice["text"] == ""
    assert len(choice["prompt_logprobs"]) == len(lm.encode("Once upon"))


def test_a_conversation_has_the_scores_of_its_prompt(post, lm):
    body = {"messages": TALK, "prompt_logprobs": 1, "return_token_ids": True, "n": 2}
    found = post("/chat/completions", **body, temperature=1).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    tokens = found["prompt_token_ids"]
    again = post("/completions", prompt=tokens, prompt_logprobs=1).json()
    assert found["prompt_logprobs"] == again["choices"][0]["prompt_logprobs"]
    assert len(found["prompt_logprobs"]) == len(tokens)


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/completions", {"prompt": "a"}), ("/chat/completions", {"messages": TALK})],
)
def test_a_stream_has_no_scores_of_its_prompt(post, path, prompt):
    found = post(path, **prompt, stream=True, prompt_logprobs=1)
    assert found.status_code == 400
    assert "the scores of a prompt" in found.json()["error"]["message"]


def test_the_server_tells_its_special_tokens(address, lm):
    found = httpx.get(f"{address}/tokenizer_info").json()
    assert found["eos_token"] == lm.tokenizer.special["eos_token"]
    assert found["chat_template"] == lm.tokenizer.template.source
    assert found["pad_token"] is None
