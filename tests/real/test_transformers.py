"""The same file in transformers: ids, logits, perplexity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from paceline import LM
from paceline.core import Floats
from paceline.measuring.perplexity import predict

QUESTION = "Give me three tips for sleeping better."
POSITIONS = 96

pytestmark = pytest.mark.timeout(1200)  # on a busy machine


def logits_of(lm: LM, ids: list[int]) -> Floats:
    """Logits at every position, in one pass."""
    parts = []
    sequence = lm.engine.start(
        np.array(ids, np.int32), lambda offset, tree, logits: parts.append(logits.copy())
    )
    lm.engine.release(sequence)
    return np.concatenate(parts)


def expected(oracle, ids: list[int]) -> Floats:
    with torch.inference_mode():
        logits: Floats = oracle(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("stored", ["auto", "fp32"])
def test_logits_are_those_of_the_dequantised_weights(path, oracle, wikitext, stored):
    with LM(path, threads=2, dtype=stored) as lm:
        ids = lm.encode(wikitext)[:POSITIONS]
        ours = logits_of(lm, ids)
    theirs = expected(oracle, ids)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 5
    if stored == "fp32":
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    else:  # the file's own bits, multiplied with activations of 16 bits
        assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
        assert np.mean(ours.argmax(1) == theirs.argmax(1)) > 0.99


def test_perplexity_is_that_of_the_dequantised_weights(lm, oracle, wikitext):
    start, *ids = lm.encode("\n" + wikitext)[: 4 * POSITIONS + 1]
    ours = predict(lm.engine, [(ids, 1)], start, window=2 * POSITIONS)
    nats = 0.0
    for begin in (0, 2 * POSITIONS):
        window = [start, *ids[begin : begin + 2 * POSITIONS]]
        rows = torch.from_numpy(expected(oracle, window[:-1])).double()
        nats += float(torch.nn.functional.cross_entropy(rows, torch.tensor(window[1:])) * len(rows))
    theirs = np.exp(nats / len(ids))
    assert 1 < theirs < 200
    assert ours.perplexity == pytest.approx(theirs, rel=1e-3)


def test_texts_have_the_ids_of_transformers(path, lm, wikitext):
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    for text in (
        wikitext,
        QUESTION,
        "Gr\u00fc\u00dfe, \u4f60\u597d! \U0001f600\n\n  x = 12345\tif",
    ):
        assert lm.encode(text) == tokenizer(text)["input_ids"]
    if lm.tokenizer.template is None:
        return
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": QUESTION},
    ]
    for messages in (talk, talk[1:2]):
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert lm.tokenizer.render_chat(messages) == theirs
        assert lm.tokenizer.encode_chat(messages) == tokenizer(theirs)["input_ids"]


def test_the_catalogue_says_which_models_are_for_chat(lm, model):
    assert (lm.tokenizer.template is not None) == model.chat
