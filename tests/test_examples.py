"""Every method's examples can be parsed; methods without one need a file or another model."""

import pytest

from paceline.registry import FAMILIES, required

# Methods whose required settings name a file or another model.
NEED_MORE = {
    "control": {"sounds", "monitor"},
    "guide": {"air", "cleangen", "contrastive", "gedi", "proxy"},
    "strategy": {"planning"},
}


@pytest.mark.parametrize("family", ["control", "guide", "strategy", "watermark"])
def test_examples_name_their_own_method_and_its_settings(family):
    registry = FAMILIES[family]
    for name, method in registry.methods().items():
        if name in NEED_MORE.get(family, ()):
            assert not method.examples, name
            continue
        assert method.examples, name
        for example in method.examples:
            assert type(registry.parse(example)) is method, example
        if not required(method) and name != "letters":
            assert registry.parse(name) == method(), name
