"""An `LM` around the toy engine, with letters for tokens."""

from dataclasses import dataclass
from threading import RLock
from types import SimpleNamespace

import numpy as np

from paceline.core import Exactness
from paceline.decoding.governor import Fixed
from paceline.drafters.base import DraftMethod, Target
from paceline.errors import RequestError
from paceline.lm import LM
from paceline.request_builder import RequestBuilder
from tests.toy import Oracle, ToyEngine


class Letters:
    """Token i is the i-th letter."""

    byte_tokens = silent = frozenset()
    template = None

    def encode(self, text, special=True, split_special=False):
        return [ord(char) % 11 for char in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def render_chat(self, messages, settings=None, split_special=False):
        raise RequestError("this model has no chat template")

    encode_chat = render_chat


class ToyLM(LM):
    def __init__(self, engine=None, stop_tokens=()):
        self.engine = engine or ToyEngine()
        self.tokenizer = Letters()
        defaults = SimpleNamespace(temperature=0.0, stop_tokens=stop_tokens, samplers=dict)
        self.model = SimpleNamespace(defaults=defaults)
        self.budget, self._load_seconds, self._lock = Fixed(8), 0.0, RLock()
        self.drafter = Oracle(self.engine)
        self.draft_target = Target(self.engine.config.vocab_size, self.engine)
        self.request_builder = RequestBuilder(self.model, self.tokenizer, self.engine, self.drafter)


@dataclass(frozen=True)
class Knowing(DraftMethod):
    """Builds the oracle of an engine."""

    engine: ToyEngine

    exactness, needs, paper, hidden = Exactness.EXACT, (), "", True

    def build(self, vocab_size):
        return Oracle(self.engine)


class Broken(ToyEngine):
    """In a tree of several nodes, `nudge` is added to the second best logit at one length."""

    def __init__(self, length, nudge, **options):
        super().__init__(**options)
        self.length, self.nudge = length, nudge

    def forward(self, batch, rows="all"):
        logits = super().forward(batch, rows).copy()
        (sequence, tree), *_ = batch
        if rows == "all" and len(tree) > 1:
            for node, depth in enumerate(tree.depths()):
                if sequence.length + depth + 1 == self.length:
                    logits[node, np.argsort(logits[node])[-2]] += self.nudge
        return logits
