import pytest

from tests.strict_skips import StrictSkips, allowed_skips

pytest_plugins = ["pytester"]
TESTS = """
import pytest

def test_named():
    pytest.skip("no browser")

def test_reasoned():
    pytest.skip("shared/models/a is not here")

def test_unnamed():
    pytest.skip("no disk")

@pytest.mark.skipif(True, reason="no net")
def test_marked():
    pass

@pytest.mark.xfail
def test_expected():
    assert False

def test_good():
    pass
"""


def test_a_skip_that_no_list_names_fails(pytester):
    pytester.makepyfile(TESTS)
    module = "import pytest\npytest.importorskip('no_such_module')"
    pytester.makepyfile(test_whole=module, test_whole_named=module)
    plugin = StrictSkips(["*::test_named", "test_whole_named.py", "shared/* is not here"])
    done = pytester.inline_run("--continue-on-collection-errors", plugins=[plugin])
    passed, skipped, failed = done.listoutcomes()
    assert [report.nodeid.rpartition("::")[2] for report in passed] == ["test_good"]
    names = {report.nodeid.rpartition("::")[2] for report in skipped}
    assert names == {"test_named", "test_reasoned", "test_expected", "test_whole_named.py"}
    said = {report.nodeid.rpartition("::")[2]: str(report.longrepr) for report in failed}
    assert set(said) == {"test_unnamed", "test_marked", "test_whole.py"}
    assert "no disk; name " in said["test_unnamed"]
    assert "no net; name " in said["test_marked"]


def test_a_listed_skip_has_a_reason():
    assert allowed_skips("# a comment\n\na.py: no disk\nb.py::c: why") == ["a.py", "b.py::c"]
    with pytest.raises(ValueError, match=r"no reason for 'a\.py:'"):
        allowed_skips("a.py:")
