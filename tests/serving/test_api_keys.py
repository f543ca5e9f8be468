import pytest

from paceline.errors import RequestError
from paceline.serving import api_keys as module
from paceline.serving.api_keys import ApiKeys


def test_keys_come_from_the_environment_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nbob: key of bob \n\n")
    keys = ApiKeys.read(["ann:key:of:ann"], file)
    assert keys.name_of(b"key:of:ann") == "ann"
    assert keys.name_of(b"key of bob") == "bob"
    assert keys.name_of(b"key of bo") is keys.name_of(b"") is None
    assert len(keys) == 2
    assert "key of" not in repr(keys) + repr(vars(keys))


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(module, "compare_digest", compare)
    keys = ApiKeys([f"name-{n}:secret-key-{n}" for n in range(5)])
    assert keys.name_of(b"secret-key-0") == "name-0"
    assert keys.name_of(b"x" * 10_000) is None
    assert compared == [(32, 32)] * 10


@pytest.mark.parametrize(
    "lines", [["noname"], [":12345678"], ["a:short"], ["a:12345678", "a:87654321"]]
)
def test_malformed_keys_are_refused_without_telling_them(lines):
    with pytest.raises(RequestError, match="API key") as caught:
        ApiKeys(lines)
    assert "12345678" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_files_without_keys_are_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot read the API keys"):
        ApiKeys.read([], tmp_path / "none")
    file = tmp_path / "keys"
    file.write_text("# nothing\n")
    with pytest.raises(RequestError, match="contains no API key"):
        ApiKeys.read([], file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        ApiKeys.read([], file)
