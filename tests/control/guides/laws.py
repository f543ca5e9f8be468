"""What each guide makes of a text, straightforwardly: every model runs all of it, every time."""

import numpy as np

from paceline.control.guides.base import guided, parse_guide
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Request, TokenTree
from paceline.engines.view import View
from tests.control.guides.beside_toy import Words
from tests.toy import ToyEngine

STOP = 0.7
SPECS = {
    "proxy": "proxy:b,c,alpha=0.7",
    "contrastive": "contrastive:b,alpha=0.05,beta=0.8",
    "cleangen": "cleangen:b,factor=1.5",
    "cfg": "cfg:negative=xyz,scale=2",
    "adaptive": f"cfg:negative=xyz,scale=2,stop={STOP}",
    "dola": "dola:layers=1+3,alpha=0.05",
    "gedi": "gedi:b,xy,z,omega=3,alpha=2,rho=1",
    "air": "air:b,xy,z,omega=2",
}


def softmax(x):
    powers = np.exp(np.asarray(x, np.float64) - np.max(x))
    return powers / powers.sum()


class Models(GuideModels):
    """The models `a` (the target), `b` and `c`, and what they say after whole texts."""

    def __init__(self, engines, tokenizer=None):
        super().__init__(engines["a"], tokenizer or Words())
        self.engines, self.known = engines, {}

    def open(self, source):
        return self.engines[source]

    def request(self, names, prompt, limit, **options):
        """A request with the guides that are named."""
        specs = [parse_guide(SPECS[name]) for name in names]
        return guided(Request(tuple(prompt), limit, **options), specs, self)

    def run(self, model, text, view=None):
        """Logits [V] and hidden state of the last of some tokens."""
        engine = self.engines[model]
        sequence = engine.start(np.array(text[:-1], np.int32))
        row = engine.forward([(sequence, TokenTree.root(text[-1]))], view=view)[0].copy()
        state = engine.hidden()[0].copy() if "hidden" in engine.abilities else None
        engine.release(sequence)
        return row, state

    def after(self, model, text, view=None):
        asked = model, tuple(text), view and tuple(view.layers)
        if asked not in self.known:
            self.known[asked] = softmax(self.run(model, text, view)[0])
        return self.known[asked]

    def code(self, text, code):
        """A text behind the code of a class, and how many tokens are new."""
        begin = self.tokenizer.encode("")
        code = self.tokenizer.encode(code, special=False)
        return [*begin, *code, *text[len(begin) :]], len(code)


def proxy(of, text, p, prompt):
    return p * (of.after("b", text) / of.after("c", text)) ** 0.7


def contrastive(of, text, p, prompt):
    return np.where(p >= 0.05 * p.max(), p * (p / of.after("b", text)) ** 0.8, 0)


def cleangen(of, text, p, prompt):
    reference = of.after("b", text)
    suspicious = p >= 1.5 * reference
    return np.where(suspicious, 0, p) + p[suspicious].sum() * reference


def cleangen_when_greedy(of, text, p, prompt):
    reference, best = of.after("b", text), int(p.argmax())
    return reference if p[best] >= 1.5 * reference[best] else p


def other(of, text, prompt):
    return of.after("a", [*of.tokenizer.encode("xyz"), *text[prompt:]])


def cfg(of, text, p, prompt):
    q = other(of, text, prompt)
    return q * (p / q) ** 2


def adaptive(of, text, p, prompt):
    for size in range(prompt, len(text)):
        before = text[:size]
        if np.abs(of.after("a", before) - other(of, before, prompt)).sum() / 2 <= STOP:
            return p
    return cfg(of, text, p, prompt)


def dola(of, text, p, prompt):
    exits = [of.after("a", text, View(layers=np.arange(n, dtype=np.int32))) for n in (1, 3)]
    q = max(exits, key=lambda q: divergence(p, q))
    return np.where(p >= 0.05 * p.max(), p / q, 0)


def divergence(p, q):
    middle = (p + q) / 2
    return (p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()


def gedi(of, text, p, prompt):
    return p * weighed(of, text, lambda row: 2 / len(text) * np.log(row), 1) ** 3


def air(of, text, p, prompt):
    return p * weighed(of, text, lambda row: np.log(-1 / np.log(row)), prompt) ** 2


def weighed(of, text, score, first):
    """Chance of the class after each token that may follow."""
    evidence = []
    for code in ("xy", "z"):
        own, new = of.code(text, code)
        rows = [score(of.after("b", own[: new + i])) for i in range(first, len(text) + 1)]
        written = sum(row[t] for row, t in zip(rows, text[first:], strict=False))
        evidence.append(np.exp(written + rows[-1]))
    return evidence[0] / (evidence[0] + evidence[1])


LAWS = {
    distribution.__name__: distribution
    for distribution in (proxy, contrastive, cleangen, cfg, adaptive, dola, gedi, air)
}


class Recomputed(ToyEngine):
    """A model that is what guides make of another: each of its rows is computed from the text."""

    name, abilities = "recomputed", frozenset({"hidden"})

    def __init__(self, models, laws, prompt):
        super().__init__()
        self.config = models.engine.config
        self.models, self.prompt = models, prompt
        self.laws = self.laws_of_forks = laws

    def logits_after(self, tokens):
        row, state = self.models.run("a", tokens)
        self.states.append(state)
        if len(tokens) < self.prompt:  # nothing follows it
            return row
        distribution = softmax(row)
        for each in self.now:
            distribution = each(self.models, tokens, distribution, self.prompt)
            distribution = distribution / distribution.sum()
        with np.errstate(divide="ignore"):
            return np.log(distribution).astype(np.float32)

    def forward(self, batch, rows="all", view=None):
        self.states = []
        forked = any(hasattr(sequence, "forked") for sequence, _ in batch)
        self.now = self.laws_of_forks if forked else self.laws
        return super().forward(batch, rows, view)

    def fork(self, sequence):
        copy = super().fork(sequence)
        copy.forked = True
        return copy

    def hidden(self):
        return np.stack(self.states)
