"""Guides over toy engines: the same tokens, other thoughts."""

import numpy as np

from paceline.control.guides.base import guided, parse_guide
from paceline.control.guides.guide_models import GuideModels
from paceline.control.temperature import Temperature
from paceline.core import Request
from tests.measuring.toy_lm import Letters
from tests.toy import ToyEngine

SPECS = {
    "proxy": "proxy:b,c,alpha=0.7",
    "contrastive": "contrastive:b,alpha=0.05,beta=0.8",
    "cleangen": "cleangen:b,factor=1.5",
    "cfg": "cfg:negative=xyz,scale=2",
    "adaptive": "cfg:scale=2,stop=0.8",
    "gedi": "gedi:b,xy,z,omega=3,alpha=2",
    "air": "air:b,xy,z,omega=2",
}


class Other(ToyEngine):
    """Another model of the same tokens."""

    def __init__(self, seed, **options):
        super().__init__(**{"order": 3, **options})
        self.seed = seed

    def logits_after(self, tokens):
        seed = [self.seed, *tokens[-self.order :]]
        return np.random.default_rng(seed).normal(0, 1.5, self.config.vocab_size).astype("f4")


class Words(Letters):
    """No token begins a text."""

    def encode(self, text, special=True, split_special=False):
        return super().encode(text)


class ToyBeside(GuideModels):
    """Has the models `a` (the target), `b` and `c`."""

    def __init__(self, **options):
        engine = ToyEngine(order=64, **options)
        super().__init__(engine, Words())
        self.engines = {"a": engine, "b": Other(1, **options), "c": Other(2, **options)}

    def open(self, source):
        return self.engines[source]

    @property
    def opened(self):
        return sum(engine.opened for engine in self.engines.values())


def toy_request(beside, spec, prompt=(1, 2, 3), temperature=0.0, **options):
    """A request with a guide."""
    controls = (Temperature(temperature),) if temperature else ()
    options = {"max_new_tokens": 20, "seed": 3, **options}
    request = Request(tuple(prompt), temperature=temperature, controls=controls, **options)
    return guided(request, [parse_guide(spec)], beside)
