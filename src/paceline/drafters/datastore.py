"""REST: a tree of what followed the last tokens anywhere in a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline import _native
from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.history.corpus_index import open_corpus
from paceline.drafters.state import checked
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters


@drafters.register("datastore", Exactness.EXACT)
@dataclass(frozen=True)
class Datastore(DraftMethod):
    """Retrieve from a corpus of millions of tokens that `paceline index-corpus` prepared.

    The last `longest` tokens are looked up in the corpus's suffix array, then fewer, until they
    occur. The longest match comes first, then up to two shorter ones. What followed their
    occurrences, the most frequent first, are branches, and each is followed in the array until the
    budget is full. How often a match of each length and frequency is right is learnt, so that
    scores are probabilities.

    State: 4 floats for each length; carried across requests. Memory: none but the mapped file of
    8 bytes a token, which processes share. Cost of a proposal: 2 microseconds a node, and 5 for
    each new token, once the pages it touches are in memory; the start reads the file once.
    Good for: text like the corpus: code with its libraries, a field's documents, earlier logs.

    Based on He et al., REST, arXiv 2311.08252, which takes the branches by frequency alone.

    Attributes:
        path: a file that `paceline index-corpus` wrote with the same tokenizer.
        longest: tokens of the longest match. Default 8: longer ones are rarely right more often.
        k: continuations of each match. Default 8.
        samples: occurrences of a match to look at, evenly spread. Default 32.
        rate: learning rate of the probabilities, 0 to 1. Default 0.02: about 50 tokens.
    """

    source = Source(authors="He et al.", title="REST", arxiv="2311.08252")

    path: str
    longest: int = 8
    k: int = 8
    samples: int = 32
    rate: float = 0.02

    def __post_init__(self) -> None:
        check_range(1, 64, "datastore", longest=self.longest, k=self.k)
        check_range(1, 4096, "datastore", samples=self.samples)
        check_range(0.0, 1.0, "datastore", rate=self.rate)

    def build(self, target: Target) -> Drafter:
        """Return a drafter over the mapped file.

        Raises:
            MethodError: there is no tokenizer, or the file is damaged or of another tokenizer.
            ModelError: the file cannot be read.
        """
        if target.tokenizer is None:
            raise MethodError("datastore needs the model's tokenizer to check its file; give one")
        corpus = open_corpus(Path(self.path), target.tokenizer, target.vocab_size)
        try:
            native = _native.CorpusMatcher(
                corpus.tokens, corpus.suffixes, self.longest, self.k, self.samples, self.rate
            )
        except ValueError as error:
            raise MethodError(f"{self.path} is damaged: {error}; make it again") from None
        return _Datastore(native)


class _Datastore(Drafter):
    origins = ("datastore",)

    def __init__(self, native: _native.CorpusMatcher) -> None:
        self._native = native
        self._prompt = 0

    def begin(self, request: Request) -> None:
        self._native.begin()
        self._prompt = len(request.prompt)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        self._native.extend(context, self._prompt)
        return single_origin_tree(*self._native.propose(context, budget))

    def state(self) -> State:
        return {"reliability": self._native.reliability().copy()}

    def load(self, state: State) -> None:
        checked("datastore", state, self.state(), {"reliability": (0, 1)})
        self._native.reliability()[:] = state["reliability"]

    def reset(self) -> None:
        self._native.reset()
        self._prompt = 0
