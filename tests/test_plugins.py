"""The worked examples of `docs/contributing/add-a-method.md`, as a package from outside."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import shared

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contributing" / "add-a-method.md"
GROUPS = {
    "echo": "paceline.drafters",
    "strided": "paceline.kvcache",
    "best_blocks": "paceline.attention",
    "norm_weighted": "paceline.compress.prune",
    "clipped": "paceline.compress.quantize",
    "bigram_head": "paceline.drafters.heads",
}
LINES = 50


def examples():
    """The source of each example by its name."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.S)
    return dict(blocks)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Runs Python with the examples installed as a package beside Paceline."""
    folder = tmp_path_factory.mktemp("plugin")
    package, about = folder / "examples_package", folder / "examples_package-1.dist-info"
    for path in (package, about):
        path.mkdir()
    (package / "__init__.py").touch()
    for name, source in examples().items():
        (package / f"{name}.py").write_text(source)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: examples-package\nVersion: 1\n")
    groups = "".join(
        f"[{group}]\n{name} = examples_package.{name}\n" for name, group in GROUPS.items()
    )
    (about / "entry_points.txt").write_text(groups)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]

    def run(*words):
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def paceline(plugin, *words):
    return plugin("-c", "from paceline.cli import main; main()", *words)


def test_every_example_is_short_and_has_a_family():
    assert set(examples()) == set(GROUPS)
    for name, source in examples().items():
        assert source.count("\n") <= LINES, name


def test_all_are_listed(plugin):
    rows = json.loads(paceline(plugin, "methods", "--json"))["methods"]
    assert set(GROUPS) <= {row["name"] for row in rows}


@pytest.mark.parametrize(
    "options",
    [
        ["--drafter", "echo:most=3", "--budget", "3"],
        ["--kv-policy", "strided:budget=24,recent=8,every=8"],
        ["--engine", "reference", "--attention", "best_blocks:count=1,local=2"],
    ],
    ids=lambda options: options[-1],
)
def test_the_command_line_uses_them(plugin, options):
    words = ["generate", "Once upon a time", "--model", shared("models", "stories260K")]
    words += ["--max-new-tokens", "80", "--temperature", "0", "--json", *options]
    text = json.loads(paceline(plugin, *map(str, words)))["text"]
    assert len(text) > 100


COMPRESS = """
import sys
import numpy as np, torch
from paceline.compress.pipeline import compress_blocks
from paceline.compress.recipe import parse_recipe
from paceline.models import blocks, load
from paceline.registry import pruners, quantizers

model = load(sys.argv[1])
outer, layers = {}, [{} for _ in model.config.layers]
for name in model.weights:
    place, key = outer, name
    if name.startswith("layers."):
        _, index, key = name.split(".", 2)
        place = layers[int(index)]
    place[key] = torch.tensor(np.asarray(model.weights[name], np.float32))
tokens = torch.tensor([model.tokenizer.encode("Once upon a time there was a dog. " * 4)])
x = blocks.embed(tokens, torch.arange(tokens.shape[1]), model.config, outer)
for family, name in ((pruners, "norm_weighted"), (quantizers, "clipped")):
    for spec in family.find(name).examples:
        errors = []
        recipe = parse_recipe(spec)
        for block in compress_blocks(model.config, layers.__getitem__, x, recipe):
            for key in ("q", "k", "v", "o", "gate", "up", "down"):
                weight = layers[block.index][key].numpy()
                lost = block.tensors[key].dense() - weight
                errors.append(np.square(lost).sum() / np.square(weight).sum())
        print(spec, max(errors))
"""


def test_compressors_keep_most_of_every_matrix(plugin):
    lines = plugin("-c", COMPRESS, str(shared("models", "stories260K"))).splitlines()
    assert len(lines) == 4
    for line in lines:
        assert 0 < float(line.split()[-1]) < 0.35, line


HEAD = """
import sys
from pathlib import Path
import numpy as np, torch
from paceline import LM
from paceline.drafters.heads.base import HeadTarget, save_head
from paceline.registry import heads

folder, out = sys.argv[1:]
lm = LM(folder, drafter="plain", budget=0)
weight = torch.tensor(np.asarray(lm.model.weights["embed"], np.float32))
about = HeadTarget(lm.model.config.hidden_size, lm.model.config.vocab_size, weight, weight)
head = heads.parse("bigram_head:depth=2,rank=4")
torch.manual_seed(0)
parameters = {name: 0.1 * torch.randn(shape) for name, shape in head.shapes(about).items()}
save_head(Path(out), head, parameters, about, lm.model.fingerprint())
drafting = LM(folder, drafter=f"head:path={out}", budget=4)
options = {"max_new_tokens": 40, "temperature": 0}
print(drafting.generate("Once", **options).tokens == lm.generate("Once", **options).tokens)
"""


def test_a_head_drafts_and_changes_nothing(plugin, tmp_path):
    model = shared("models", "stories260K")
    assert plugin("-c", HEAD, str(model), str(tmp_path / "head")).split() == ["True"]
