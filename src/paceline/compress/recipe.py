"""Recipes: which methods compress which matrix, and in what order."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.compress.base import (
    OF_GRADIENTS,
    BlockTransform,
    BlockTuner,
    Compressor,
    Correction,
    ModelTuner,
    Statistic,
)
from paceline.compress.base import WeightCompressor as Weight
from paceline.compress.prune.base import Pruner
from paceline.compress.recipe_checks import check_inputs, check_together
from paceline.compress.structure.base import StructureMethod
from paceline.errors import MethodError, unknown
from paceline.method_spec import parse_specs
from paceline.models.tensors import RoundedInputs
from paceline.registry import (
    corrections,
    factorizers,
    pruners,
    quantizers,
    structures,
    transforms,
    tuners,
)

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.base import Statistics
    from paceline.models.config import ModelConfig
    from paceline.models.tensors import Linear

KEEP = "keep"  # the recipe of what stays as it is
NAMED = ("mobilenmt",)  # recipes that come with Paceline, in the folder `recipes`
# In the order in which they come in a recipe.
REGISTRIES = (structures, transforms, pruners, quantizers, factorizers, corrections, tuners)
_STAGES = {
    "structure": -1,
    "transform": 0,
    "pruner": 1,
    "quantizer": 2,
    "factorizer": 2,
    "correction": 3,
    "tuner": 4,
}


@dataclass(frozen=True)
class Steps:
    """The methods of one recipe; none keeps the matrices as they are.

    Attributes:
        text: as the user wrote them.
        transforms: of whole blocks.
        compressors: of single matrices, each of what the one before it made.
        corrections: of what they lost.
        tuners: of the stored forms of a block.
        model_tuner: of those of all blocks together; or None.
        structures: that change the whole model before, in order.
    """

    text: str = KEEP
    transforms: tuple[BlockTransform, ...] = ()
    compressors: tuple[Weight, ...] = ()
    corrections: tuple[Correction, ...] = ()
    tuners: tuple[BlockTuner, ...] = ()
    model_tuner: ModelTuner | None = None
    structures: tuple[StructureMethod, ...] = ()

    @property
    def statistics(self) -> frozenset[Statistic]:
        """Return what calibration has to measure for the matrices, after the transforms."""
        return _required(self._methods).union(*(each.optional_statistics for each in self._methods))

    @property
    def required_statistics(self) -> frozenset[Statistic]:
        """Return what calibration has to measure because a method cannot do without."""
        return _required(self._methods)

    @property
    def _methods(self) -> tuple[Compressor, ...]:
        return (*self.compressors, *self.corrections, *self.tuners)

    def for_matrix(self, name: str, config: ModelConfig) -> Steps:
        """Return the steps with the settings for one matrix by its canonical name."""
        return replace(
            self, compressors=tuple(each.for_matrix(name, config) for each in self.compressors)
        )

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> dict[str, Steps]:
        """Return the steps of each matrix of a block; see `WeightCompressor.for_block`."""
        plans = [method.for_block(weights, stats) for method in self.compressors]
        chosen = {}
        for name in weights:
            methods = tuple(plan[name] for plan in plans if name in plan)
            chosen[name] = replace(self, compressors=methods) if methods else Steps()
        return chosen

    def notes(self, shape: tuple[int, int]) -> list[str]:
        """Return what the card tells of a matrix of some shape."""
        if len(self.compressors) > 1 and isinstance(self.compressors[0], Pruner):
            rounded = ", ".join(each.name for each in self.compressors[1:])
            pruned = (
                f"pruned and then stored by {rounded}: files leave out codes of zero where that is "
                "smaller, and so does the native engine beside scales of 32 inputs and more"
            )
            rest = (each.note(shape) for each in self.compressors[1:])
            return [pruned, *(note for note in rest if note is not None)]
        notes = (each.note(shape) for each in self.compressors)
        return [note for note in notes if note is not None]

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Return the stored form of a matrix, float32 [out, in]."""
        import torch

        rest, stored = weight, None
        for method in self.compressors:
            stored = method.compress(rest, stats)
            rest = torch.from_numpy(stored.dense())
            if isinstance(method, Pruner):
                stats = replace(stats, kept=rest != 0)
        assert stored is not None, "a recipe that keeps a matrix compresses none"
        if isinstance(stored, RoundedInputs):  # what corrects multiplies the same inputs
            return replace(stored, matrix=self._correct(weight, stored.matrix, stats))
        return self._correct(weight, stored, stats)

    def _correct(self, weight: Tensor, stored: Linear, stats: Statistics) -> Linear:
        for correction in self.corrections:
            stored = correction.correct(weight, stored, stats)
        return stored


@dataclass(frozen=True)
class Recipe:
    """Steps for all matrices of the blocks, and others for some of them.

    Attributes:
        steps: for every matrix that no rule matches.
        rules: (pattern of canonical names, steps); the first that matches counts.
        head: steps for embedding and head; kept as they are by default.
    """

    steps: Steps
    rules: tuple[tuple[str, Steps], ...] = ()
    head: Steps = Steps()

    def __post_init__(self) -> None:
        """Refuse transforms that a method of some matrices does not bear."""
        for steps in (self.steps, *(each for _, each in self.rules)):
            check_inputs(steps.compressors, self.transforms)
            fisher = [
                each
                for each in steps.compressors
                if Statistic.FISHER in each.statistics | each.optional_statistics
            ]
            if self.transforms and fisher:
                raise MethodError(
                    f"{fisher[0].name} weighs errors by gradients of the weights as "
                    f"they are, and {self.transforms[0].name} changes these; leave one of them out "
                    "of the recipe"
                )

    def notes(self, shapes: Mapping[str, tuple[int, int]], config: ModelConfig) -> list[str]:
        """Return what the card tells of matrices, by their canonical names and shapes."""
        found: Counter[str] = Counter()
        for name, shape in shapes.items():
            steps = self.steps_of(name) if name.startswith("layers.") else self.head
            for note in steps.for_matrix(name, config).notes(shape):
                found[note] += 1
        return [
            f"{count} {'matrix is' if count == 1 else 'matrices are'} {note}."
            for note, count in found.items()
        ]

    def steps_of(self, name: str) -> Steps:
        """Return the steps for a matrix by its canonical name, e.g. `layers.0.q`."""
        place = self.rule_of(name)
        return self.steps if place is None else self.rules[place][1]

    def rule_of(self, name: str) -> int | None:
        """Return the place of the rule that a matrix falls under; None where there is none."""
        places = enumerate(pattern for pattern, _ in self.rules)
        return next((place for place, each in places if fnmatchcase(name, each)), None)

    def for_block(
        self, index: int, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> dict[str, Steps]:
        """Return the steps of each matrix of the block `index`, by its name there (`q`)."""
        groups: dict[Steps, list[str]] = {}
        for name in weights:
            groups.setdefault(self.steps_of(f"layers.{index}.{name}"), []).append(name)
        chosen: dict[str, Steps] = {}
        for steps, names in groups.items():
            chosen |= steps.for_block({name: weights[name] for name in names}, stats)
        return chosen

    @property
    def transforms(self) -> tuple[BlockTransform, ...]:
        """Transforms of whole blocks; rules cannot change them."""
        return self.steps.transforms

    @property
    def structures(self) -> tuple[StructureMethod, ...]:
        """Methods that change the whole model before; rules cannot have any."""
        return self.steps.structures

    @property
    def changes_of(self) -> str | None:
        """Return the checkpoint that only differences from are written; None to write all.

        That is so where a structure says it and nothing comes after; empty for the source.
        """
        last = self.structures[-1] if self.structures else None
        alone = not self.steps.compressors and not self.rules and not self.head.compressors
        return last.changes_of if last is not None and alone else None

    @property
    def tuners(self) -> tuple[BlockTuner, ...]:
        """Tuners of whole blocks; rules cannot change them."""
        return self.steps.tuners

    @property
    def model_tuner(self) -> ModelTuner | None:
        """The tuner of the whole model; rules cannot have one."""
        return self.steps.model_tuner

    @property
    def own_texts(self) -> bool:
        """Whether a method is calibrated on the model's own texts by default."""
        return self.model_tuner is not None and self.model_tuner.own_texts

    @property
    def needs_data(self) -> bool:
        """Whether any method looks at calibration texts."""
        steps = (self.steps, *(each for _, each in self.rules))
        learnt = bool(self.structures or self.transforms or self.tuners or self.model_tuner)
        return learnt or any(each.statistics for each in steps)

    @property
    def wanted_of_gradients(self) -> frozenset[Statistic]:
        """Return what the methods want to know from gradients of the whole model."""
        steps = (self.steps, *(each for _, each in self.rules))
        return frozenset().union(*(each.statistics for each in steps)) & OF_GRADIENTS

    def __str__(self) -> str:
        texts = [self.steps.text, *(f"{pattern} = {steps.text}" for pattern, steps in self.rules)]
        if self.head.compressors:
            texts.append(f"head = {self.head.text}")
        return "; ".join(texts)

    def wanted(self, names: Iterable[str]) -> frozenset[Statistic]:
        """Return what calibration has to measure for some matrices, after the transforms."""
        each = [self.steps_of(name).statistics for name in names]
        return frozenset().union(*each)


def parse_recipe(text: str, head: str = KEEP) -> Recipe:
    """Read a recipe: `METHOD[:key=value,...]+METHOD...`, a TOML file, or the name of one of ours.

    A file has `recipe = "..."`, optionally `head = "..."`, and any number of tables `[[rule]]`
    with `match`, a pattern of canonical names such as `layers.0.*`, and `recipe`.

    Raises:
        MethodError: an unknown method or setting, an order that cannot be, or a file that is none.
    """
    if text in NAMED:
        return _from_file(Path(__file__).with_name("recipes") / f"{text}.toml", head)
    if text.endswith(".toml"):
        return _from_file(Path(text), head)
    return Recipe(parse_steps(text), head=_head(head))


def parse_steps(text: str) -> Steps:
    """Read the methods of `METHOD+METHOD`; `keep` is none.

    Raises:
        MethodError: as `parse_recipe`.
    """
    if text.strip() == KEEP:
        return Steps()
    methods = [_build(spec.name, spec) for spec in parse_specs(text, _names(), lambda name: [])]
    for one, other in pairwise(methods):
        if _STAGES[one.family] > _STAGES[other.family]:
            raise MethodError(
                f"in the recipe {text!r}, {other.name} ({other.family}) comes after {one.name} "
                f"({one.family}); the order is structures, transforms, a pruner, a quantizer or "
                "factorizer, corrections, tuners"
            )
        if _STAGES[one.family] == _STAGES[other.family] and _STAGES[one.family] in (1, 2):
            raise MethodError(
                f"{one.name} and {other.name} do not go together: each makes a stored form of its "
                "own; leave one of them out of the recipe"
            )
    check_together(text, methods)
    steps = Steps(
        text,
        tuple(each for each in methods if isinstance(each, BlockTransform)),
        tuple(each for each in methods if isinstance(each, Weight)),
        tuple(each for each in methods if isinstance(each, Correction)),
        tuple(each for each in methods if isinstance(each, BlockTuner)),
        next((each for each in methods if isinstance(each, ModelTuner)), None),
        tuple(each for each in methods if isinstance(each, StructureMethod)),
    )
    if not steps.compressors and len(steps.structures) < max(len(methods), 1):
        raise MethodError(
            f"the recipe {text!r} compresses nothing; add a quantizer, a pruner or a factorizer"
        )
    return steps


def _head(text: str) -> Steps:
    steps = parse_steps(text)
    calibrated = steps.required_statistics | steps.statistics & {Statistic.SENSITIVITY}
    whole = steps.structures or steps.transforms or steps.tuners or steps.model_tuner
    if whole or calibrated:
        raise MethodError(
            f"the recipe {text!r} of embedding and head needs calibration, and these are not "
            "calibrated; take a method without data, e.g. rtn:bits=8"
        )
    return steps


def _build(name: str, spec: Any) -> Compressor:
    for registry in REGISTRIES:
        if registry.current_name(name) in registry.methods():
            built: Compressor = registry.build(spec)
            return built
    raise MethodError(unknown("method of compression", name, _names()))


def _names() -> list[str]:
    return [name for registry in REGISTRIES for name in registry.visible()]


def _required(methods: tuple[Compressor, ...]) -> frozenset[Statistic]:
    return frozenset().union(*(method.statistics for method in methods))


def _from_file(path: Path, head: str) -> Recipe:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MethodError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MethodError(f"the recipe {path} is no TOML file: {error}") from None
    if extra := sorted(values.keys() - {"recipe", "head", "rule"}):
        raise MethodError(unknown(f"entry of {path}", extra[0], ["recipe", "head", "rule"]))
    rules = values.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise MethodError(f"the rules of {path} are no tables; write [[rule]] before each")
    found = []
    for rule in rules:
        if extra := sorted(rule.keys() - {"match", "recipe"}):
            raise MethodError(unknown(f"entry of a rule of {path}", extra[0], ["match", "recipe"]))
        match = _text(path, rule, "match")
        steps = parse_steps(_text(path, rule, "recipe"))
        whole = () if steps.model_tuner is None else (steps.model_tuner,)
        for method in (*steps.structures, *steps.transforms, *steps.tuners, *whole):
            raise MethodError(
                f"the rule for {match!r} in {path} has the {method.family} {method.name}, "
                "which changes more than matrices; put it into the recipe of all"
            )
        found.append((match, steps))
    chosen = head if head != KEEP or "head" not in values else _text(path, values, "head")
    return Recipe(parse_steps(_text(path, values, "recipe")), tuple(found), _head(chosen))


def _text(path: Path, values: Mapping[str, Any], key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise MethodError(f"{path} has no text {key!r} where it needs one")
    return text
