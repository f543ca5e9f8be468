"""The contract of a trained head: shapes of its tensors, and logits from a hidden state and a path.

A head predicts tokens after the next one from what the target computed anyway. A method writes
`shapes` and `logits`; the base class gives the loss, reads and writes the files, and
`drafters/head.py` grows trees with any head.

Axes: N states or paths, D hidden size, L tokens of a path, V vocabulary, U columns of logits.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.abilities import Ability
from paceline.core import Tokens
from paceline.drafters.heads.frozen import FrozenModel
from paceline.errors import ModelError
from paceline.models.fields import read_json
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, write_json, write_safetensors
from paceline.registry import Method, check_range, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models import Model

    Parameters = Mapping[str, Tensor]

CONFIG, TENSORS = "head.json", "head.safetensors"


@dataclass(frozen=True, slots=True)
class HeadTarget:
    """The model that a head is for.

    Attributes:
        hidden_size: D.
        vocab_size: V.
        embedding: float32 [V, D], the model's token embeddings; not trained.
        unembedding: float32 [U, D], rows of the model's output head, one for each column of
            logits: all V tokens, or some of them; not trained.
        frozen: the model's layers, for heads that train what goes into them.
    """

    hidden_size: int
    vocab_size: int
    embedding: Tensor
    unembedding: Tensor
    frozen: FrozenModel | None = None


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """Training positions.

    Attributes:
        hidden: float32 [N, D], the target's hidden states after the last norm.
        tokens: int64 [N, L + 1], the tokens that follow each: the first is the target's own next
            token, which a head is given; it predicts the others.
        columns: int64 [N, L, K], columns of the logits of the target's K likeliest tokens for each
            predicted one; None where the predicted tokens themselves are what is right.
        probs: float32 [N, L, K], the target's probabilities of these; None likewise.
        at: int64 [N], position of each state in the answers, so that neighbours of one text differ
            by 1 and texts lie further apart; for heads that read earlier states.
    """

    hidden: Tensor
    tokens: Tensor
    columns: Tensor | None = None
    probs: Tensor | None = None
    at: Tensor | None = None

    def cross_entropy(self, logits: Tensor, length: int) -> Tensor:
        """Return the mean cross entropy in nats of the tokens behind paths of a length, a scalar.

        Args:
            logits: [N, U].
            length: of the paths, from 1 on.
        """
        from torch.nn import functional as F

        if self.columns is None or self.probs is None:
            return F.cross_entropy(logits, self.tokens[:, length])
        found = logits.log_softmax(-1).gather(1, self.columns[:, length - 1])
        probs = self.probs[:, length - 1]
        return -(found * (probs / probs.sum(-1, keepdim=True))).sum(-1).mean()


@dataclass(frozen=True)
class Head(Method, ABC):
    """Settings of a head: its fields are its hyper-parameters.

    Attributes:
        depth: tokens that it predicts after the target's own next token.
        run: neighbouring positions that a training batch holds at least, one behind the other.
        lead: how far behind a state's own token the paths begin; 0: with this token itself.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})
    run: ClassVar[int] = 1
    lead: ClassVar[int] = 1

    depth: int = 4

    def __post_init__(self) -> None:
        check_range(1, 64, self.name, depth=self.depth)

    @abstractmethod
    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return the shape of each trained tensor by name."""

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return parameters to train from; here all 0, as a residual block that adds nothing.

        Args:
            target: the model.
            seed: of random ones.
        """
        import torch

        return {name: torch.zeros(shape) for name, shape in self.shapes(target).items()}

    def columns(self, parameters: Parameters, tokens: Tensor) -> Parameters:
        """Return the tensors for logits of some tokens only, int64 [U]; differentiable.

        Only output matrices of the head's own change; here there are none.
        """
        return parameters

    @abstractmethod
    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] of the token that follows a path; differentiable.

        Args:
            parameters: tensors of the shapes that `shapes` gave.
            target: the model.
            hidden: float32 [N, D], states of the target.
            path: int64 [N, L], 1 <= L <= depth: the tokens that follow each state, the first drawn
                by the target itself.
        """

    def batch_logits(
        self, parameters: Parameters, target: HeadTarget, batch: HeadBatch
    ) -> list[Tensor]:
        """Return the logits [N, U] behind the batch's own paths, for each length from 1 on."""
        return [
            self.logits(parameters, target, batch.hidden, batch.tokens[:, :length])
            for length in range(1, batch.tokens.shape[1])
        ]

    def loss(self, parameters: Parameters, target: HeadTarget, batch: HeadBatch) -> Tensor:
        """Return the mean cross entropy in nats over all predicted tokens of a batch, a scalar."""
        losses = [
            batch.cross_entropy(logits, length)
            for length, logits in enumerate(self.batch_logits(parameters, target, batch), 1)
        ]
        return sum(losses[1:], losses[0]) / len(losses)

    def spec(self) -> str:
        """Return the head as `NAME:key=value,...`."""
        return f"{self.name}:" + ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


@dataclass(frozen=True)
class ContextHead(Head):
    """Settings of a head that also reads the states before the last one.

    `head` keeps one row of each committed token since the answer began, as `encode` makes it.

    Attributes:
        window: earlier states that it reads at most, from 1 on.
    """

    run: ClassVar[int] = 32

    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, 4096, self.name, window=self.window)

    @abstractmethod
    def encode(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, following: Tensor
    ) -> Tensor:
        """Return what later positions read of states, [M, E].

        Args:
            parameters: tensors of the shapes that `shapes` gave.
            target: the model.
            hidden: float32 [M, D], states of the target.
            following: int64 [M], the token behind each.
        """

    @abstractmethod
    def logits(
        self,
        parameters: Parameters,
        target: HeadTarget,
        hidden: Tensor,
        path: Tensor,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [N, U] of the token that follows a path; see `Head.logits`.

        `memory`, [M, E], M <= window, are the rows of the states before `hidden`, in their order,
        the same for all paths; None: there are none.
        """


@dataclass(frozen=True)
class ExitHead(Head):
    """Settings of a head behind the model's first layers.

    Its states are those behind these layers, after the model's last norm, and it predicts the very
    next token: a path is the token of the state itself.

    Attributes:
        layers: first layers that a draft pass runs, from 1 on.
        depth: predicted tokens of each state: 1.
    """

    lead: ClassVar[int] = 0

    depth: int = 1
    layers: int = 8

    def __post_init__(self) -> None:
        check_range(1, 1, self.name, depth=self.depth)
        check_range(1, 1 << 20, self.name, layers=self.layers)


@dataclass(frozen=True)
class InputHead(Head):
    """Settings of inputs that are trained in place of tokens, and run by the model itself.

    It predicts the very next token, too: a path is the token of the state itself.
    """

    lead: ClassVar[int] = 0
    run: ClassVar[int] = 32

    @abstractmethod
    def mixed_tokens(self, vocab_size: int) -> Tokens:
        """Return the tokens whose embeddings are mixed by the tensor `mix`, int32 [K]."""


def embed_path(target: HeadTarget, path: Tensor) -> Tensor:
    """Return the embeddings of paths [N, L], each with a root mean square of 1, [N, L, D]."""
    from torch.nn import functional as F

    return F.rms_norm(target.embedding[path], (target.hidden_size,))


def head_target(model: Model) -> HeadTarget:
    """Return a model as its heads see it."""
    import torch

    def tensor(name: str) -> Tensor:
        return torch.tensor(np.asarray(model.weights[name], np.float32))

    config, embedding = model.config, tensor("embed")
    unembedding = embedding if config.tied else tensor("head")
    frozen = FrozenModel(model)
    return HeadTarget(config.hidden_size, config.vocab_size, embedding, unembedding, frozen)


def save_head(
    folder: Path,
    head: Head,
    parameters: Parameters,
    target: HeadTarget,
    fingerprint: str,
    card: Mapping[str, float] | None = None,
    frequent: Sequence[int] = (),
) -> None:
    """Write a trained head: `head.json` and `head.safetensors`.

    Args:
        folder: is made if it does not exist.
        head: its settings.
        parameters: its tensors.
        target: the model that it was trained for.
        fingerprint: of that model's weights, see `Model.fingerprint`.
        card: what is known of its training, by name.
        frequent: tokens that occurred in the text that it was trained on, most frequent first.

    Raises:
        ModelError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from None
    arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in parameters.items()}
    pending = {name: Pending(a.shape, partial(np.asarray, a)) for name, a in arrays.items()}
    write_safetensors(folder / TENSORS, pending)
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    about = {"head": head.spec(), "model": fingerprint, **sizes, "card": dict(card or {})}
    write_json(folder / CONFIG, about | {"frequent": [int(token) for token in frequent]})


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """A trained head.

    Attributes:
        head: its settings.
        parameters: its tensors.
        frequent: int32, tokens that occurred in the text that it was trained on, most frequent
            first; empty where that is not known.
    """

    head: Head
    parameters: Parameters
    frequent: Tokens


def load_head(folder: Path, target: HeadTarget) -> LoadedHead:
    """Read a head that was trained for `target`.

    Raises:
        ModelError: the folder holds no head, a damaged one, or one for a model of another shape.
        MethodError: its architecture is not known here.
    """
    import torch

    config = read_json(folder / CONFIG)
    spec = config.get("head")
    if not isinstance(spec, str):
        raise ModelError(f"{folder / CONFIG} names no head; expected a key `head` with NAME:...")
    for key in ("hidden_size", "vocab_size"):
        if config.get(key) != getattr(target, key):
            raise ModelError(
                f"the head in {folder} is for a model with {key} {json.dumps(config.get(key))}, "
                f"this one has {getattr(target, key)}; train one for it"
            )
    head: Head = heads.parse(spec)
    stored = read_file(folder / TENSORS)
    shapes = head.shapes(target)
    if {name: tensor.shape for name, tensor in stored.items()} != shapes:
        raise ModelError(
            f"the tensors of {folder / TENSORS} are not those of {spec}; train it anew"
        )
    parameters = {
        name: torch.from_numpy(tensor.values.astype("float32")) for name, tensor in stored.items()
    }
    if any(not tensor.isfinite().all() for tensor in parameters.values()):
        raise ModelError(f"{folder / TENSORS} holds values that are not finite; train it anew")
    return LoadedHead(head, parameters, _frequent(folder, config.get("frequent", []), target))


def _frequent(folder: Path, tokens: object, target: HeadTarget) -> Tokens:
    known = isinstance(tokens, list) and all(
        type(token) is int and 0 <= token < target.vocab_size for token in tokens
    )
    if not isinstance(tokens, list) or not known or len(set(tokens)) != len(tokens):
        raise ModelError(
            f"{folder / CONFIG} has a list `frequent` that does not hold different tokens of the "
            "model; train the head anew"
        )
    return np.array(tokens, np.int32)
