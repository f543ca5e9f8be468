"""What a plan chooses from and what it is to reach: setups of a model, and a goal."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from paceline.errors import RequestError

PREFERENCES = ("speed", "memory")


class CacheForm(NamedTuple):
    """How keys and values are kept and read.

    Attributes:
        kv_format: of cached keys and values; `auto` is `fp32`.
        policy: `NAME[:key=value,...]`, or None to keep all rows.
        attention: pattern, `NAME[:key=value,...]`, or None to read all rows.
    """

    kv_format: str = "auto"
    policy: str | None = None
    attention: str | None = None

    @property
    def far(self) -> bool:
        """Return whether only texts as long as the context show what it loses."""
        return self.policy is not None or self.attention is not None

    @property
    def words(self) -> list[str]:
        """Return what differs from the default, in words."""
        words = [] if self.kv_format == "auto" else [f"KV {self.kv_format}"]
        if self.policy is not None:
            words.append(f"KV policy {self.policy}")
        if self.attention is not None:
            words.append(f"attention {self.attention}")
        return words


ALL_ROWS = CacheForm()


@dataclass(frozen=True)
class Setup:
    """How a model is run: arguments of `LM` and options of the command line.

    Attributes:
        model: a checkpoint, as `LM` takes it.
        format: of the weights, see `engines.formats`.
        drafter: `NAME[:key=value,...]`.
        budget: maximum nodes of a tree beyond its root, or `auto`.
        kv_format: of cached keys and values.
        kv_policy: `NAME[:key=value,...]`, or None to keep all rows.
        attention: pattern, `NAME[:key=value,...]`, or None to read all rows.
        threads: of the native engine; None takes its default.
        weights_memory: bytes of weights in memory, others stream from disk; None keeps all.
    """

    model: str
    format: str = "auto"
    drafter: str = "blend"
    budget: int | str = "auto"
    kv_format: str = "auto"
    kv_policy: str | None = None
    attention: str | None = None
    threads: int | None = None
    weights_memory: int | None = None

    @property
    def plain(self) -> bool:
        """Return whether nothing is drafted."""
        return self.drafter == "plain" or self.budget == 0

    @property
    def cache(self) -> CacheForm:
        """Return how keys and values are kept and read."""
        return CacheForm(self.kv_format, self.kv_policy, self.attention)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `LM` beside the model."""
        return {
            "dtype": self.format,
            "drafter": self.drafter,
            "budget": self.budget,
            "kv_format": self.kv_format,
            "kv_policy": self.kv_policy,
            "attention": self.attention,
            "threads": self.threads,
            "weights_memory": self.weights_memory,
        }

    def flags(self) -> dict[str, str]:
        """Return the options of the command line that differ from their defaults."""
        default = Setup(self.model)
        named = {
            "--format": "format",
            "--drafter": "drafter",
            "--budget": "budget",
            "--kv-format": "kv_format",
            "--kv-policy": "kv_policy",
            "--attention": "attention",
            "--threads": "threads",
            "--weights-memory": "weights_memory",
        }
        return {
            flag: str(getattr(self, name))
            for flag, name in named.items()
            if getattr(self, name) != getattr(default, name)
        }

    def command(self, verb: str = "generate") -> str:
        """Return the command line that runs this setup."""
        words = ["paceline", verb, "--model", self.model]
        for flag, value in self.flags().items():
            words += [flag, value]
        return shlex.join(words)

    @property
    def title(self) -> str:
        """Return the setup in a few words, the model apart."""
        drafting = "plain" if self.plain else f"{self.drafter}@{self.budget}"
        parts = [self.format, drafting, *self.cache.words]
        if self.threads is not None:
            parts.append(f"{self.threads} threads")
        if self.weights_memory is not None:
            parts.append(f"{self.weights_memory / 1e6:.0f} MB of weights in memory")
        return ", ".join(parts)

    def document(self) -> dict[str, Any]:
        """Return the fields that are not None, for JSON and TOML."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Goal:
    """What a plan is to reach.

    Attributes:
        memory: maximum bytes of weights, keys and values, drafters and scratch; None: no limit.
        context: positions that each user's text may have; None: those of the prompts and answers.
        users: texts that run at once.
        loss: maximum loss in nats a token, or in score where a judge is given; 0 with `exact`.
        exact: only what changes no output.
        prefer: `speed`, the most tokens a second, or `memory`, the fewest bytes.
    """

    memory: int | None = None
    context: int | None = None
    users: int = 1
    loss: float = 0.02
    exact: bool = False
    prefer: str = "speed"

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory < 1:
            raise RequestError(f"the memory is {self.memory} bytes, expected 1 or more")
        if self.context is not None and self.context < 2:
            raise RequestError(f"the context is {self.context} tokens, expected 2 or more")
        if not 1 <= self.users <= 4096:
            raise RequestError(f"users is {self.users}, expected 1 to 4096")
        if not (math.isfinite(self.loss) and self.loss >= 0):
            raise RequestError(f"the loss is {self.loss}, expected a number of 0 or more")
        if self.prefer not in PREFERENCES:
            raise RequestError(
                f"prefer is {self.prefer!r:.40}, expected {' or '.join(PREFERENCES)}"
            )

    @property
    def max_loss(self) -> float:
        """Return the loss that is allowed."""
        return 0.0 if self.exact else self.loss

    def document(self) -> dict[str, Any]:
        """Return the fields that are not None, for JSON and TOML."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
