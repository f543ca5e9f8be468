import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.drafters.draft_model.cross_tokenizer import CrossTokenizer
from paceline.models.tokenizer import open_tokenizer, same_tokens
from tests.conftest import shared
from tests.drafters.steps import check_tree

NAMES = ("bitstories-3M", "TinyStories-656K", "tinystories-instruct-3m-chat")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: open_tokenizer(shared("models", name)) for name in (*NAMES, "stories260K")}


def array(ids):
    return np.array(ids, np.int32)


def test_equal_and_other_tokens_are_told_apart(tokenizers):
    assert same_tokens(tokenizers["bitstories-3M"], tokenizers["stories260K"])
    assert not same_tokens(tokenizers["bitstories-3M"], tokenizers["TinyStories-656K"])


@pytest.mark.parametrize("draft", NAMES)
@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("cut", range(3))
def test_guessed_text_comes_back_as_the_targets_tokens(tokenizers, draft, target, cut):
    """Wherever the text stops, also inside a word, the tokens of the whole are found again."""
    ours, theirs = tokenizers[target], tokenizers[draft]
    whole = ours.encode("Once upon a time there was a little dog called Tim. He was happy.")
    context = array(whole[: 8 - cut])
    translation = CrossTokenizer(theirs, ours, 1 << 20)
    own, rest = translation.into(context)
    said = theirs.encode("Once upon a time there was a little dog called Tim. He was happy.")
    if said[: len(own)] != own.tolist():  # the last word was longer than what is tokenised anew
        assert rest
        return
    tree = TokenTree.chain(array(said[len(own) - 1 :]), score=0.5)
    logits = np.zeros((1, len(theirs)), np.float32)
    assert translation.begun(logits, TokenTree.root(int(own[-1])), rest)[0, tree.tokens[1]] == 0
    back = translation.back(context, own, rest, tree, 64)
    assert back.tokens.tolist() == whole[len(context) - 1 :]
    assert back.scores.prod() == pytest.approx(0.5 ** (len(tree) - 1), rel=1e-3)


@settings(deadline=None, max_examples=15)
@given(
    text=st.text(max_size=30),
    seed=st.integers(0, 999),
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    budget=st.integers(0, 12),
)
def test_any_text_and_any_guess_give_a_valid_tree(tokenizers, text, seed, names, budget):
    draft, target = (tokenizers[name] for name in names)
    translation = CrossTokenizer(draft, target, 512)
    context = array([1, *target.encode(text)][-40:])
    own, rest = translation.into(context)
    if not len(own):
        return
    random = np.random.default_rng(seed)
    tokens = random.integers(0, len(draft), 8)
    parents = [-1, *(int(random.integers(0, n)) for n in range(1, 8))]
    if len({*zip(tokens, parents, strict=True)}) < 8:
        return
    tokens[0] = own[-1]
    scores = random.random(8, np.float32)
    tree = TokenTree(array(tokens), array(parents), scores, np.array([-1] + [0] * 7, np.int16))
    back = translation.back(context, own, rest, tree, budget)
    check_tree(back, int(context[-1]), budget, max(512, int(context[-1]) + 1))


def test_half_a_character_cannot_be_read():
    tokenizer = open_tokenizer(shared("models", "bitstories-3M"))
    ids = tokenizer.encode("é", special=False)
    halves = [i for i in ids if i in tokenizer.byte_tokens]
    if len(halves) < 2:
        halves = sorted(tokenizer.byte_tokens)[0xC3:0xC4] * 2
    translation = CrossTokenizer(tokenizer, tokenizer, 512)
    assert not len(translation.into(array([1, halves[0]]))[0])
