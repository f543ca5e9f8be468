"""Which methods go together in one recipe; refusals name both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from paceline.compress.base import (
    BlockTransform,
    BlockTuner,
    Compressor,
    ModelTuner,
    WeightCompressor,
)
from paceline.compress.structure.base import StructureMethod
from paceline.errors import MethodError


def check_together(text: str, methods: Sequence[Compressor]) -> None:
    """Refuse methods that undo each other, though their order is right."""
    _check_shared(methods)
    methods = [each for each in methods if not isinstance(each, StructureMethod)]
    for method in methods:
        if isinstance(method, WeightCompressor) and method.alone and len(methods) > 1:
            raise MethodError(
                f"{method.name} does not bear other methods in {text!r}; give it a rule of its own "
                'in a .toml file, e.g. match = "*.[kv]"'
            )
    _check_zeros(methods)
    for one, other in pairwise(methods):
        if isinstance(one, ModelTuner):
            raise MethodError(
                f"{one.name} trains the whole model when all of its blocks are done, and "
                f"{other.name} comes after it; put it last, once"
            )
    for one, other in pairwise(methods):
        if (one.family, other.family) == ("pruner", "factorizer"):
            raise MethodError(
                f"{one.name} and {other.name} do not go together: the product that {other.name} "
                "stores has no zeros where weights were pruned; leave one of them out"
            )
        if isinstance(one, BlockTransform) and one.of_inputs and isinstance(other, BlockTransform):
            raise MethodError(
                f"{one.name} changes inputs, and {other.name} looks at them as they are; put "
                f"{one.name} behind all other transforms, once"
            )


def _check_shared(methods: Sequence[Compressor]) -> None:
    """Refuse what would give layers that share matrices different ones."""
    for place, method in enumerate(methods):
        if not isinstance(method, StructureMethod) or not method.shares_layers:
            continue
        for other in methods[place + 1 :]:
            whole = StructureMethod | BlockTransform | BlockTuner | ModelTuner
            if isinstance(other, whole):
                raise MethodError(
                    f"{other.name} changes the matrices of each layer, and layers share them "
                    f"behind {method.name}; leave {other.name} out, or put it before"
                )


def _check_zeros(methods: Sequence[Compressor]) -> None:
    """Refuse what would fill the zeros of a pruner: quantizers without a zero, tuners of codes."""
    pruner = next((each for each in methods if each.family == "pruner"), None)
    quantizer = next((each for each in methods if each.family == "quantizer"), None)
    if pruner is None or not isinstance(quantizer, WeightCompressor):
        return
    if not quantizer.keeps_zeros:
        raise MethodError(
            f"{quantizer.name}, set like this, does not keep the zeros that {pruner.name} makes; "
            "take rtn or gptq with even levels, or leave one of them out"
        )
    for tuner in methods:
        if isinstance(tuner, ModelTuner) and tuner.keeps_codes:
            continue
        if isinstance(tuner, BlockTuner | ModelTuner):
            raise MethodError(
                f"{tuner.name} moves the codes of all weights, and would fill the zeros that "
                f"{pruner.name} makes; leave one of them out"
            )


def check_inputs(methods: Sequence[WeightCompressor], before: Sequence[BlockTransform]) -> None:
    """Refuse transforms of the inputs that a stored form takes as they are."""
    for method in methods:
        for transform in before:
            if method.plain_inputs and transform.of_inputs:
                raise MethodError(
                    f"{method.name} stores what multiplies the inputs as they are, and "
                    f"{transform.name} changes them; leave one of them out of the recipe"
                )
