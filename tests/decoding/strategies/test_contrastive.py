import numpy as np
import pytest

from paceline.core import Request
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.contrastive import ContrastiveSearch
from paceline.engines import open_engine
from paceline.errors import MethodError, RequestError
from tests.toy import ToyEngine


def slow(model, prompt, limit, k, penalty):
    """The paper's equation 5 with the whole text run for each candidate, in transformers."""
    import torch

    def look(tokens):
        with torch.inference_mode():
            got = model(torch.tensor([tokens]), output_hidden_states=True)
        return got.logits[0, -1].softmax(-1), got.hidden_states[-1][0]

    tokens = list(prompt)
    for _ in range(limit):
        probs, _ = look(tokens)
        values = {}
        for prob, token in zip(*probs.topk(k), strict=True):
            states = look([*tokens, int(token)])[1]
            states = states / states.norm(dim=-1, keepdim=True)
            similar = float((states[:-1] @ states[-1]).max())
            values[int(token)] = (1 - penalty) * float(prob) - penalty * similar
        tokens.append(max(values, key=values.get))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("settings", [ContrastiveSearch(), ContrastiveSearch(k=8, penalty=0.3)])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_it_takes_what_the_papers_formula_takes(stories, theirs, prompts, settings, name):
    engine = open_engine(stories, name)
    (output,) = settings.run(Task(engine, Request(prompts[0], 14)))
    assert output.tokens == slow(theirs, prompts[0], 14, settings.k, settings.penalty)
    assert output.passes == 15


def test_without_a_penalty_it_is_greedy(run, theirs, prompts):
    (output,) = run(ContrastiveSearch(penalty=0.0), Request(prompts[1], 14))
    assert output.tokens == slow(theirs, prompts[1], 14, 1, 0.0)


def test_it_ends_at_stop_tokens_and_at_the_context(run, prompts, engine):
    free = run(ContrastiveSearch(), Request(prompts[0], 14))[0].tokens
    (output,) = run(ContrastiveSearch(), Request(prompts[0], 14, stop_tokens=frozenset({free[5]})))
    assert (output.tokens, output.finish) == (free[: free.index(free[5]) + 1], "stop")
    long = (prompts[0] * 200)[: engine.config.context - 3]
    (output,) = run(ContrastiveSearch(), Request(long, 14))
    assert (len(output.tokens), output.finish) == (3, "context")


def test_engines_without_hidden_states_are_refused():
    with pytest.raises(MethodError, match="and the engine toy do not go together"):
        ContrastiveSearch().run(Task(ToyEngine(), Request((1, 2), 5)))


def test_hidden_states_are_the_same_bits_however_they_are_made(engine, prompts):
    """Row by row, in one chain, and beside another sequence; as many as there are logits."""
    from paceline.core import TokenTree

    ids = np.array(prompts[0], np.int32)
    one_by_one, sequence = [], engine.open()
    for token in ids:
        engine.forward([(sequence, TokenTree.root(token))])
        one_by_one.append(engine.hidden())
        engine.commit(sequence, [0])
    engine.truncate(sequence, 0)
    other = engine.open()
    batch = [(other, TokenTree.chain(ids[::-1].copy())), (sequence, TokenTree.chain(ids))]
    engine.forward(batch)
    assert (engine.hidden()[len(ids) :] == np.concatenate(one_by_one)).all()
    engine.forward(batch, [False, True])
    assert (engine.hidden() == np.concatenate(one_by_one)).all()
    engine.forward(batch, "none")
    with pytest.raises(RequestError, match="no logits"):
        engine.hidden()
    for each in (sequence, other):
        engine.release(each)


def test_hidden_states_of_both_engines_agree(stories, engine, prompts):
    from paceline.core import TokenTree

    found = []
    for each in (engine, open_engine(stories, "reference")):
        sequence = each.open()
        each.forward([(sequence, TokenTree.chain(prompts[0]))])
        found.append(each.hidden())
        each.release(sequence)
        each.forward([(each.open(), TokenTree.root(3))], "none")
        with pytest.raises(RequestError, match="no logits"):
            each.hidden()
    np.testing.assert_allclose(*found, atol=1e-4)


def test_bad_settings_are_refused():
    for settings in ({"k": 0}, {"k": 257}, {"penalty": -0.1}, {"penalty": float("nan")}):
        with pytest.raises(MethodError, match="contrastive"):
            ContrastiveSearch(**settings)
