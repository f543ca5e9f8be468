"""HTTPS with a certificate that is made here: while loading, while serving, and what is refused."""

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from paceline.errors import RequestError
from paceline.serving.loading_answers import answering
from paceline.serving.tls import server_context
from tests.serving.test_loading_answers import listener  # noqa: F401 (a fixture)

PROGRAM = [sys.executable, "-c", "from paceline.cli import main; main()", "serve", "--port", "0"]

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    for name in ("own", "other"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"),
        )
    both = (folder / "own.pem").read_text() + (folder / "own.key").read_text()
    (folder / "both.pem").write_text(both)
    secret = ("-passout", "pass:secret", "-aes256")
    openssl("pkey", "-in", folder / "own.key", "-out", folder / "secret.key", *secret)
    (folder / "text.pem").write_text("no certificate")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    (folder / "damaged.pem").write_text(f"{begin}\nAAAA\n{end}\n")
    return folder


def plain_answer(address):
    """What a client gets that does not speak TLS."""
    with socket.create_connection(address, timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        try:
            return plain.recv(4096)
        except ConnectionError:
            return b""


def client(files):
    return ssl.create_default_context(cafile=str(files / "own.pem"))


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("missing.pem", "own.key", "cannot read ssl_certfile"),
        ("own.pem", "missing.key", "cannot read ssl_keyfile"),
        ("text.pem", "own.key", "has no certificate"),
        ("own.pem", "text.pem", "has no private key"),
        ("own.pem", None, "has no private key"),
        ("own.pem", "other.key", "is not that of the certificate"),
        ("own.pem", "secret.key", "is encrypted"),
        ("damaged.pem", "own.key", "cannot be used"),
        (".", "own.key", "cannot read ssl_certfile"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(files, certificate, key, said):
    with pytest.raises(RequestError, match=said) as caught:
        server_context(files / certificate, key and files / key)
    assert "\n" not in str(caught.value)


def test_the_program_refuses_before_it_loads(files, paceline):
    done = paceline("serve", "--ssl-certfile", files / "own.pem", "--ssl-keyfile", "missing")
    assert (done.code, done.err) == (
        2,
        "paceline: cannot read ssl_keyfile missing: No such file or directory\n",
    )
    done = paceline("serve", "--ssl-keyfile", files / "own.key")
    assert done.code == 2
    assert "ssl_keyfile needs its certificate" in done.err


def test_one_file_may_hold_both(files):
    assert server_context(files / "both.pem", None)


def test_while_loading_the_answer_is_503_over_tls(files, listener):  # noqa: F811
    address = f"https://127.0.0.1:{listener.getsockname()[1]}/ready"
    with answering(listener, server_context(files / "own.pem", files / "own.key")):
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(address, timeout=10, context=client(files))
            caught.value.close()
            assert caught.value.code == 503
            assert not plain_answer(listener.getsockname()).startswith(b"HTTP")


def test_a_server_speaks_https(files):
    words = ("--ssl-certfile", files / "own.pem", "--ssl-keyfile", files / "own.key")
    words = (*words, "--log-format", "text")
    with subprocess.Popen([*PROGRAM, *words], stderr=subprocess.PIPE, text=True) as server:
        try:
            said = next(line for line in server.stderr if line.startswith("serving"))
            address = re.search(r"https://\S+", said)[0]
            body = json.dumps({"prompt": "Once", "max_tokens": 3, "model": "embedded"}).encode()
            request = urllib.request.Request(
                f"{address}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60, context=client(files)) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 3
            port = int(address.rpartition(":")[2])
            assert not plain_answer(("127.0.0.1", port)).startswith(b"HTTP")
            server.terminate()
            log = server.stderr.read()
            assert re.search(r"^\d\d:\d\d:\d\d request .*status=200", log, re.MULTILINE), log
        finally:
            server.kill()
