"""While a model loads, the port answers; afterwards it belongs to the server."""

import json
import socket
import urllib.error
import urllib.request

import pytest

from paceline.serving.loading_answers import answering


@pytest.fixture
def listener():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found


def test_every_request_is_told_to_come_back(listener):
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with answering(listener):
        for path in ("/ready", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(address + path, timeout=10)
            assert caught.value.code == 503
            assert caught.value.headers["Retry-After"]
            assert not json.load(caught.value)["ready"]
        with socket.create_connection(listener.getsockname()) as silent:
            silent.close()
        request = urllib.request.Request(address, headers={"Accept": "text/html,*/*"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.headers["Content-Type"] == "text/html"
        assert "The model is loading" in caught.value.read().decode()
    listener.settimeout(10)
    with socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()  # nobody else takes it any more
        connection.close()
