"""Who stops listening is no longer worked for."""

import json
import socket
import time

import pytest

from tests.serving.halting import halt

BODY = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "n": 3}


def raw(path, body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def until(true):
    while not true():  # the test's time limit ends it
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_work_along(address, service, monkeypatch, stream):
    halt(monkeypatch, service.worker, tokens=9)
    host, port = address.removeprefix("http://").split(":")
    made = service.worker.stats.tokens
    with socket.create_connection((host, int(port))) as client:
        client.sendall(raw("/v1/completions", BODY | {"stream": stream}))
        until(lambda: service.worker.stats.tokens > made)
        assert not stream or client.recv(1)
    until(lambda: service.worker.idle and service.idle)
    assert service.worker.stats.tokens - made < 3 * 400
    assert not service.worker.scheduler.jobs


def test_those_that_wait_for_a_prompt_are_given_up_too(service, lm):
    from paceline.serving.messages import Job
    from paceline.serving.worker import Worker

    worker = Worker(lm)
    request = lm.request("Once upon a time", max_new_tokens=3)
    worker.submit(Job("a", request))
    worker.submit(Job("b", request, after="a"))
    assert [event.finish for event in worker.cancel("b")] == ["cancelled"]
    while not worker.idle:
        worker.step()
    assert worker.stats.tokens == 3
