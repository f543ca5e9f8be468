"""Models with known answers: a bigram table over words, and one that says what it is told to."""

from types import SimpleNamespace

import numpy as np

from tests.toy import ToyEngine

WORDS = ["<s>", "the", "cat", "cats", "sleeps", "sleep", "dog", "barks"]


class Words:
    """A word a token; unknown words are refused by KeyError."""

    def __init__(self, begins=True):
        self.begins = begins

    def encode(self, text, special=True, split_special=False):
        start = [0] if special and self.begins else []
        return start + [WORDS.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)

    def token(self, index):
        return WORDS[index]

    def token_id(self, text):
        return WORDS.index(text) if text in WORDS else None

    def special_id(self, role):
        return 0 if self.begins and role == "bos_token" else None


class Bigrams(ToyEngine):
    """The probability of a word depends on the one before it; `table` is [word before, word]."""

    def __init__(self, table, context=64):
        super().__init__(vocab_size=len(WORDS), context=context)
        self.table = np.log(np.asarray(table)).astype(np.float32)
        self.passes = 0

    def logits_after(self, tokens):
        return self.table[tokens[-1]]

    def forward(self, batch, rows="all", view=None):
        self.passes += 1
        return super().forward(batch, rows, view)


def table(**probabilities):
    """Uniform rows but for `before_after=probability`; the rest of a row is shared evenly."""
    size = len(WORDS)
    rows = np.full((size, size), 1 / size)
    for name, probability in probabilities.items():
        before, after = (WORDS.index(word) for word in name.split("_"))
        rows[before] = (1 - probability) / (size - 1)
        rows[before, after] = probability
    return rows


def bigram_lm(begins=True, context=64, **probabilities):
    return SimpleNamespace(
        engine=Bigrams(table(**probabilities), context), tokenizer=Words(begins), model=None
    )


class Scripted:
    """Answers prompts by a function, and counts them."""

    def __init__(self, answer, context=100_000):
        self.answer, self.prompts = answer, []
        self.engine = ToyEngine(context=context)
        self.tokenizer = SimpleNamespace(encode_chat=lambda messages: messages[0]["content"])

    def encode(self, text):
        return text

    def generate(self, prompts, **options):
        assert options["temperature"] == 0
        self.prompts += prompts
        return [SimpleNamespace(text=self.answer(prompt), finish="stop") for prompt in prompts]
