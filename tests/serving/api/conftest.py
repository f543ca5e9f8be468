"""A real server on a free port of this machine, and clients of it."""

import contextlib
import socket
import threading
from pathlib import Path

import openai
import pytest
import uvicorn

import paceline
from paceline import LM
from paceline.planning.machine_picture import served_picture
from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.service import Service
from paceline.serving.worker import Worker


@contextlib.contextmanager
def served(app, listener=None):
    """The address of a running server."""
    with listener or socket.socket() as listener:
        if listener.getsockname()[1] == 0:
            listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="package")
def lm(tmp_path_factory):
    """The embedded model, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    for file in (Path(paceline.__file__).parent / "embedded").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return LM(folder)


@pytest.fixture(scope="package")
def service(lm):
    service = Service(Worker(lm))
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="package")
def address(service):
    picture = playground.machine_router(lambda lm: served_picture(lm).document())
    with served(create_app(service, "tiny", routers=[playground.router, picture])) as found:
        yield found


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found
