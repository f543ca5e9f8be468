"""Parts of the middleware by themselves."""

import pytest

pytest.importorskip("fastapi")

from paceline.serving.api.middleware import _bearer, _is_unicode


def bearer(*values):
    return _bearer({"headers": [(b"authorization", value) for value in values]})


def test_a_key_is_read_from_a_bearer_header_only():
    assert bearer(b"Bearer secret") == b"secret"
    assert bearer(b"bearer  secret ") == b"secret"
    for other in (b"Basic secret", b"Token secret", b"Digest secret", b"Bearersecret", b""):
        assert bearer(other) == b""
    assert bearer() == b""


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b"", b'{"a": "\xc3\xa9"}', b"3"])
def test_what_is_not_json_is_left_to_the_route(body):
    assert _is_unicode(body)


@pytest.mark.parametrize("body", [rb'"\ud800"', rb'{"\udfff": 1}', rb'["a", ["\ud83d"]]'])
def test_half_a_character_is_found_anywhere(body):
    assert not _is_unicode(body)
    assert _is_unicode(rb'"\ud83e\udd8a"')
