"""Methods that a search under a budget leaves out, and that the recipe it finds has all the same.

They change no size: training of what structures left, transforms of whole blocks, and tuners.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.compress.base import BlockTransform, BlockTuner, ModelTuner
from paceline.compress.recipe import KEEP
from paceline.compress.structure.recover import Recover
from paceline.errors import MethodError
from paceline.registry import structures, transforms, tuners

_FAMILIES = (structures, transforms, tuners)


@dataclass(frozen=True)
class Around:
    """Methods before and behind the levels of a recipe, as a user writes them.

    Attributes:
        structures: that train what is left of the shapes.
        transforms: of whole blocks.
        tuners: of blocks, or of the whole model.
    """

    structures: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    tuners: tuple[str, ...] = ()

    def recipe(self, shapes: str, level: str) -> str:
        """Return a recipe with everything that has something to work on.

        Args:
            shapes: structure that gives layers their shapes; empty where all stay whole.
            level: methods of most matrices, or `keep`.
        """
        parts = [shapes, *self.structures] if shapes else []
        if level != KEEP:
            parts += [*self.transforms, level, *self.tuners]
        return "+".join(parts) or KEEP

    def note(self, recipe: str) -> str:
        """Return what the card tells of those that a recipe has, a sentence after a space."""
        named = set(recipe.split("+"))
        used = [
            each for each in (*self.structures, *self.transforms, *self.tuners) if each in named
        ]
        if not used:
            return ""
        return f" The recipe has {', '.join(used)}, too, which these divergences are without."


def split_around(text: str, shapes: bool) -> tuple[Around, str]:
    """Return the methods around the levels of a recipe, and the rest of it.

    Recipes with `|` between them share what they name.

    Args:
        text: e.g. `recover+awq+gptq:group=32|recover+awq+rtn:bits=8`.
        shapes: whether the search chooses shapes, so that training has something to make up for.

    Raises:
        MethodError: one of them would change the size, or has nothing to do.
    """
    found: dict[str, list[str]] = {each.package: [] for each in _FAMILIES}
    rest = []
    for part in text.split("|"):
        kept = []
        for word in (each.strip() for each in part.split("+")):
            name = word.partition(":")[0].strip()
            registry = next((each for each in _FAMILIES if _has(each, name)), None)
            if registry is None:
                kept.append(word)
                continue
            _check(registry.parse(word), shapes)
            if word not in found[registry.package]:
                found[registry.package].append(word)
        rest.append("+".join(kept) or KEEP)
    chosen = [tuple(found[each.package]) for each in _FAMILIES]
    return Around(*chosen), "|".join(dict.fromkeys(rest))


def _has(registry: object, name: str) -> bool:
    return registry.current_name(name) in registry.methods()  # type: ignore[attr-defined]


def _check(method: object, shapes: bool) -> None:
    """Refuse a method that the search cannot do without, or that changes sizes."""
    name: str = method.name  # type: ignore[attr-defined]
    if isinstance(method, Recover):
        if not shapes:
            raise MethodError(
                f"{name} trains what structures left, and this search leaves nothing out; add "
                f"narrow, attention_drop or layer_drop, or leave {name} out"
            )
        return
    same_size = (
        (isinstance(method, BlockTransform) and not method.of_inputs)
        or isinstance(method, BlockTuner)
        or (isinstance(method, ModelTuner) and method.keeps_codes)
    )
    if not same_size:
        raise MethodError(
            f"{name} changes what whole blocks store, and --budget counts the bytes of matrices by "
            "themselves; leave it out, or write its result first and search that"
        )
