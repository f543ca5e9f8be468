"""The shape of the package: imports point downward only, and a family folder holds methods only."""

import ast
import importlib
from pathlib import Path

import pytest

import paceline
from paceline.registry import FAMILIES

PACKAGE = Path(paceline.__file__).parent

# From the bottom up. A module may import its own layer and those below it.
LAYERS = [
    [
        "abilities",
        "arguments",
        "byte_sizes",
        "compatibility",
        "core",
        "errors",
        "features",
        "method_card",
        "method_spec",
        "noise",
        "registry",
        "cache_dir",
        "machine",
        "sandbox",
    ],
    ["models"],
    ["engines"],
    ["attention", "compress", "control", "documents", "drafters", "exits", "kvcache", "watermarks"],
    ["decoding", "training"],
    ["loading", "prompt_filter", "request_builder", "request_options", "scoring"],
    ["serving"],  # is handed an LM, and knows no more than its type
    ["deprecated", "lm"],  # generates several prompts at once by serving's worker
    ["planning", "measuring"],
    ["cli"],
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Modules of a family folder that hold no method: what all methods of the family share.
SHARED = {
    "drafter": {"base", "member_account", "state"},
    "head": {"base", "attention", "frozen"},
    "control": {"base", "capabilities", "logits", "sampler_spec"},
    "guide": {"base", "guide_models", "guide_stream"},
    "strategy": {"base"},
    "watermark": {"base"},
    "attention pattern": {"base"},
    "exit policy": {"base"},
    "pruner": {"base"},
    "quantizer": {"base"},
    "factorizer": {"base"},
    "structure": {"base"},
    "transform": {"base"},
    "correction": {"base"},
    "tuner": {"base"},
    "allocator": {"base"},
    "kv policy": {"base", "query_attention"},
}


def imported(file: Path) -> set[str]:
    """The modules of ours that a file imports when it is imported or run."""
    names = set()
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]  # read by mypy only
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "paceline":
            names |= {f"paceline.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paceline."):
            names.add(str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("paceline.")}
    return names


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_layer():
    found = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__", "embedded"} == set(RANKS)


def test_imports_point_downward():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imported(file):
            other = top(module)
            if own in RANKS and other in RANKS and RANKS[other] > RANKS[own]:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {module}")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_folder_holds_one_method_a_file(family):
    registry = FAMILIES[family]
    folder = Path(importlib.import_module(registry.package).__file__ or "").parent
    homes = [method.__module__ for method in registry.methods().values()]
    for file in folder.glob("*.py"):
        if file.stem == "__init__" or file.stem in SHARED[family]:
            continue
        assert homes.count(f"{registry.package}.{file.stem}") == 1, file


def calls(file: Path) -> set[str]:
    """The names of methods that a file calls, with what they are called on."""
    nodes = [
        node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]
    return {ast.unparse(func) for func in nodes if isinstance(func, ast.Attribute)}


@pytest.mark.parametrize("folder", ["drafters", "control", "watermarks"])
def test_what_drafts_or_edits_commits_nothing(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        for call in calls(file):
            owner, _, name = call.rpartition(".")
            assert name not in ("commit", "truncate", "evict"), f"{file} calls {call}"
            assert name != "extend" or "engine" not in owner, f"{file} calls {call}"


def test_only_model_backed_drafters_import_engines():
    from paceline.drafters.base import Drafter, ModelBacked

    for file in (PACKAGE / "drafters").glob("*.py"):
        if not any(top(module) == "engines" for module in imported(file)):
            continue
        module = importlib.import_module(f"paceline.drafters.{file.stem}")
        kinds = [each for each in vars(module).values() if isinstance(each, type)]
        own = [each for each in kinds if each.__module__ == module.__name__]
        built = [each for each in own if issubclass(each, Drafter)]
        assert all(issubclass(each, ModelBacked) for each in built), file
