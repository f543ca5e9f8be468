"""A server process on a free port of this machine, with SmolLM2 and an API key."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from typing import NamedTuple

import pytest

from tests.real_models import real_file

PROGRAM = [sys.executable, "-c", "from paceline.cli import main; main()", "serve"]
KEY = "sk-of-the-tests"
MODEL = "smollm2"


class Server(NamedTuple):
    """Where the server is, and how clients are let in."""

    address: str
    base_url: str  # for clients of OpenAI
    model: str = MODEL
    key: str = KEY


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith("tests/clients/"):
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the clients' own


@pytest.fixture(scope="session")
def server():
    words = ["--model", real_file("smollm2-135m"), "--name", MODEL, "--port", "0", "--threads", "2"]
    words += ["--budget", "3"]  # few tokens in a pass, so that streams have many pieces
    environment = os.environ | {"PACELINE_SERVE_KEYS": f"tests:{KEY}"}
    with subprocess.Popen(
        [*PROGRAM, *words], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving"):
                    break
            else:
                pytest.fail("".join(said))
            # Whatever else it logs is shown where a test fails.
            forward = threading.Thread(target=sys.stderr.writelines, args=(process.stderr,))
            forward.start()
            address = line.split()[-1]
            yield Server(address, f"{address}/v1")
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def plain(server):
    """What the server answers to a plain body without any client: the message."""

    def answer(**body):
        options = {"model": MODEL, "temperature": 0, "max_tokens": 16}
        request = urllib.request.Request(
            f"{server.base_url}/chat/completions",
            json.dumps(options | body).encode(),
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["choices"][0]["message"]

    return answer
