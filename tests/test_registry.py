import sys
import threading
from dataclasses import dataclass

import pytest

from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Method, Registry, controls, drafters, required


@pytest.fixture
def registry():
    made = Registry("thing", "paceline.control")
    made._loaded = True

    @made.register("one", Exactness.EXACT)
    @dataclass(frozen=True)
    class One(Method):
        size: int = 1
        rate: float = 0.5
        kind: str = "a"
        on: bool = False
        many: tuple[int, ...] = ()

    return made


def test_settings_are_parsed_by_type(registry):
    method = registry.parse("one:size=3,rate=0.25,kind=b,on=true")
    assert (method.size, method.rate, method.kind, method.on) == (3, 0.25, "b", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("onne", "unknown thing 'onne'; did you mean one"),
        ("one:sise=3", "unknown setting of one 'sise'; did you mean size"),
        ("one:size", "has no value"),
        ("one:size=x", "one:size is 'x', expected int"),
        ("one:on=1", "expected true or false"),
        ("one:many=1", "set it from Python"),
    ],
)
def test_mistakes_are_named(registry, text, said):
    with pytest.raises(MethodError, match=said):
        registry.parse(text)


def test_a_name_belongs_to_one_method(registry):
    with pytest.raises(MethodError, match="two methods"):
        registry.register("one", Exactness.EXACT)(int)


@pytest.mark.parametrize("family", [drafters, controls], ids=lambda r: r.family)
def test_every_registered_method_describes_itself(family):
    for name, method in family.methods().items():
        assert method.__doc__, name
        assert method.__dataclass_params__.frozen, name
        assert method.name == name


def test_settings_without_a_default_are_asked_for():
    method = drafters.methods()["datastore"]
    assert required(method) == ["path"]
    assert required(drafters.methods()["lookahead_trie"]) == []
    with pytest.raises(MethodError, match="datastore needs path; write datastore:path=VALUE"):
        drafters.parse("datastore:k=3")
    assert drafters.parse("datastore:path=corpus").path == "corpus"


def test_threads_wait_for_all_methods(tmp_path, monkeypatch):
    """A thread that asks while another one loads sees every method, or waits."""
    package = tmp_path / "slow_family"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("a", "b"):
        (package / f"{name}.py").write_text("import time\ntime.sleep(0.05)\n")
    monkeypatch.syspath_prepend(tmp_path)
    family = Registry("slow", "slow_family")
    finished = []

    def look():
        family.methods()
        finished.append(all(f"slow_family.{name}" in sys.modules for name in ("a", "b")))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert finished == [True] * 4
