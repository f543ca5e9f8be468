"""Levels of a recipe: the same methods with other shares of zeros, or other numbers of bits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import product

from paceline.compress.base import WeightCompressor
from paceline.compress.prune.base import Pruner
from paceline.compress.quantize.base import Quantizer
from paceline.compress.recipe import KEEP, REGISTRIES, Recipe, Steps, parse_recipe
from paceline.errors import MethodError
from paceline.method_spec import parse_specs

SPARSITIES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BITS = (2, 3, 4, 5, 6, 8)


def level_recipes(text: str, head: str = KEEP, fewest: int = 2) -> tuple[Recipe, ...]:
    """Return the levels of a recipe, e.g. `wanda`, `gptq:group=32` or `wanda|sparsegpt+gptq`.

    A pruner without a pattern has levels of sparsity, a quantizer levels of bits, unless the recipe
    names one; a recipe with neither is one level. Recipes with `|` between them are all levels of
    one search.

    Args:
        text: recipes without transforms and tuners, which change whole blocks.
        head: recipe of embedding and head.
        fewest: levels that a search needs.

    Raises:
        MethodError: a recipe changes whole blocks, or there are too few levels.
    """
    recipes: dict[str, Recipe] = {}
    for part in text.split("|"):
        for each in _variants(parse_recipe(part.strip(), head), _named_settings(part.strip())):
            with suppress(MethodError):  # widths that a method does not have
                recipes[each] = parse_recipe(each, head)
    if len(recipes) < fewest:
        raise MethodError(
            f"the recipe {text!r} has one level, so that there is nothing to search; name a pruner "
            "without a pattern, a quantizer of several widths, or several recipes with | between "
            "them"
        )
    return tuple(recipes.values())


def _named_settings(text: str) -> dict[str, set[str]]:
    """Return which settings of each method a recipe names."""
    if text == KEEP or text.endswith(".toml"):
        return {}
    names = [name for registry in REGISTRIES for name in registry.names()]
    return {spec.name: set(spec.settings) for spec in parse_specs(text, names, lambda name: [])}


def _variants(recipe: Recipe, named: Mapping[str, set[str]]) -> list[str]:
    """Return the recipe with each of its levels, as text.

    Args:
        recipe: of all matrices.
        named: settings of each method that stay as they are.
    """
    if recipe.rules:
        raise MethodError(
            "the recipe has rules for some matrices, which a search with --budget would replace; "
            "name one recipe for all"
        )
    steps = recipe.steps
    whole = (
        *steps.structures,
        *steps.transforms,
        *steps.tuners,
        *filter(None, [steps.model_tuner]),
    )
    if whole:
        raise MethodError(
            f"{whole[0].name} changes whole blocks, and a search with --budget gives every matrix "
            "a recipe of its own; leave it out"
        )
    if not steps.compressors:
        return [KEEP]
    choices = [_levels_of(each, named.get(each.name, set())) for each in steps.compressors]
    return [_text(steps, chosen) for chosen in product(*choices)]


def _levels_of(method: WeightCompressor, named: set[str]) -> list[dict[str, object]]:
    """Return settings of a method that make its levels; one without settings where it has one."""
    if isinstance(method, Pruner) and not method.has_pattern and "sparsity" not in named:
        return [{"sparsity": each} for each in SPARSITIES]
    if isinstance(method, Quantizer):
        if method.mean_bits:
            raise MethodError(
                f"{method.name}:mean_bits divides bits among matrices, and so does --budget; leave "
                "one of them out"
            )
        if "bits" not in named:
            return [{"bits": each} for each in BITS if each <= method.widest]
    return [{}]


def _text(steps: Steps, chosen: tuple[dict[str, object], ...]) -> str:
    changed = zip(steps.compressors, chosen, strict=True)
    methods = [_spec(method, settings) for method, settings in changed]
    return "+".join([*methods, *(_spec(each, {}) for each in steps.corrections)])


def _spec(method: object, changed: dict[str, object]) -> str:
    """Return a method with its settings as a user writes it; defaults are left out."""
    parts = []
    for field in fields(method):  # type: ignore[arg-type]
        value = changed.get(field.name, getattr(method, field.name))
        if field.name in changed or value != field.default:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            parts.append(f"{field.name}={text}")
    name: str = method.name  # type: ignore[attr-defined]
    return f"{name}:{','.join(parts)}" if parts else name
