"""Load: when requests are sent, how waits are counted, and what servers may do."""

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import PacelineError, RequestError
from paceline.measuring.load.client import ServerAddress
from paceline.measuring.load.run import (
    Reply,
    Traffic,
    arrivals,
    drive,
    first_model,
    sender,
    summary,
)
from tests.measuring import virtual_time
from tests.measuring.fake_server import answer, piece, serving, sse


class Slow:
    """Answers one request after the other, each in `takes` seconds."""

    def __init__(self, takes, fails=()):
        self.takes, self.fails, self.lock = takes, fails, asyncio.Lock()
        self.under_way = self.most = 0

    async def __call__(self, number, due):
        loop = asyncio.get_running_loop()
        reply = Reply(due, loop.time())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        async with self.lock:
            await asyncio.sleep(self.takes)
        self.under_way -= 1
        reply.done = loop.time()
        reply.error = "503" if number in self.fails else ""
        return reply


def test_arrivals_are_a_poisson_process():
    gaps = np.diff([0.0, *itertools.islice(arrivals(4.0, 1), 20_000)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # memoryless: mean and deviation agree
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03
    assert list(itertools.islice(arrivals(4.0, 1), 5)) != list(
        itertools.islice(arrivals(4.0, 2), 5)
    )


def test_an_open_loop_charges_a_stall_to_all_who_came_in_it():
    async def run():
        return await drive(Slow(1.0), Traffic(rate=2.0, requests=50, seed=3))

    replies = virtual_time.run(run())
    due = list(itertools.islice(arrivals(2.0, 3), 50))
    assert [reply.due for reply in replies] == pytest.approx(due)
    assert [reply.sent for reply in replies] == pytest.approx(due)
    done, expected = 0.0, []
    for at in due:  # a queue with one clerk
        done = max(at, done) + 1.0
        expected.append(done - at)
    assert [reply.done - reply.due for reply in replies] == pytest.approx(expected)
    assert summary(replies)["latency"]["max"] == pytest.approx(max(expected))


def test_a_late_sender_is_seen_and_its_waits_count_from_when_they_were_due():
    async def run():
        async def blocks(number, due):
            loop = asyncio.get_running_loop()
            reply = Reply(due, loop.time())
            if number == 0:
                loop._selector.now += 10.0  # the generator's own process stood still
            reply.done = loop.time()
            return reply

        return await drive(blocks, Traffic(rate=5.0, requests=20))

    found = summary(virtual_time.run(run()))
    assert found["late"] > 5.0
    assert found["latency"]["p50"] > 5.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 30))
def test_a_closed_loop_has_so_many_users_and_no_more(users, requests):
    slow = Slow(1.0)

    async def run():
        return await drive(slow, Traffic(users=users, requests=requests))

    replies = virtual_time.run(run())
    assert len(replies) == requests
    assert slow.most == min(users, requests)
    found = summary(replies)
    assert found["seconds"] == pytest.approx(requests)
    assert found["requests_per_second"] == pytest.approx(1.0)


def test_seconds_end_the_sending_and_not_the_answers():
    async def run(traffic):
        return await drive(Slow(1.0), traffic)

    closed = virtual_time.run(run(Traffic(users=1, seconds=4.5)))
    assert [reply.due for reply in closed] == [0, 1, 2, 3, 4]
    assert closed[-1].done == 5
    opened = virtual_time.run(run(Traffic(rate=3.0, seconds=4.5)))
    assert len(opened) == sum(at < 4.5 for at in itertools.islice(arrivals(3.0, 0), 99))


def test_a_refused_user_waits_before_asking_again():
    async def run():
        return await drive(Slow(0.0, fails=range(99)), Traffic(users=1, seconds=0.95))

    assert len(virtual_time.run(run())) == 10


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        (Traffic(requests=1), "one of a rate"),
        (Traffic(rate=1.0, users=1, requests=1), "one of a rate"),
        (Traffic(rate=1.0), "no end"),
    ],
)
def test_a_load_without_end_or_loop_is_refused(traffic, message):
    with pytest.raises(RequestError, match=message):
        virtual_time.run(drive(Slow(1.0), traffic))


def test_the_summary_of_known_replies():
    good = Reply(due=1.0, sent=1.0, pieces=[1.5, 1.7, 2.5], tokens=6, done=2.6)
    short = Reply(due=2.0, sent=2.5, pieces=[3.0], tokens=1, done=3.0)
    bad = Reply(due=2.0, sent=2.0, done=5.0, error="429")
    found = summary([good, short, bad], slo_ttft=0.6, slo_tpot=0.25)
    assert found["errors"] == {"429": 1}
    assert found["ttft"]["p50"] == pytest.approx(0.75)
    assert found["tpot"]["max"] == pytest.approx(0.2)
    assert found["gap"]["mean"] == pytest.approx(0.5)
    assert found["latency"]["max"] == pytest.approx(1.6)
    assert found["tokens_per_second"] == pytest.approx(7 / 4)
    assert found["late"] == pytest.approx(0.5)
    assert found["slo"]["kept"] == 1
    assert found["slo"]["share"] == pytest.approx(1 / 3)
    assert summary([bad])["ttft"] is None
    assert summary([good, Reply(0.0, done=1.0)])["tokens_counted_by"] == "pieces"


def ask(script, count=1, timeout=20.0, body=None):
    with serving(script) as fake:
        send = sender(
            ServerAddress.parse(fake.url, "secret"), lambda n: body or {"prompt": "x"}, timeout
        )

        async def run():
            return [await send(number, 0.0) for number in range(count)]

        return asyncio.run(run()), fake.asked


@pytest.mark.parametrize("how", ["length", "close", "chunked"])
def test_a_stream_is_followed_however_its_end_is_told(how):
    stream = sse(piece("Once"), piece(" upon"), piece("", "stop"), piece("") | {"choices": []})
    [reply], [(line, fields, body)] = ask(lambda *_: answer(stream, how=how))
    assert not reply.error
    assert len(reply.pieces) == reply.count == 2
    assert reply.sent <= reply.pieces[0] <= reply.pieces[1] <= reply.done
    assert line == "POST /v1/completions HTTP/1.1"
    assert fields["authorization"] == "bearer secret"
    assert body == {"prompt": "x"}


def test_the_servers_count_of_tokens_is_believed():
    stream = sse(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "Once"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 9}},
    )
    [reply], [(line, _, _)] = ask(lambda *_: answer(stream), body={"messages": []})
    assert (len(reply.pieces), reply.count) == (1, 9)
    assert line.startswith("POST /v1/chat/completions ")


@pytest.mark.parametrize(
    ("said", "error", "detail"),
    [
        (answer(b'{"error": {"message": "too many"}}', 429), "429", "too many"),
        (answer(b"<html>", 502), "502", ""),
        (answer(sse(piece("Once"), done=False), how="close"), "broken", "too early"),
        (answer(sse(piece("Once"), done=False), how="chunked")[:-9], "broken", ""),
        (answer(sse(piece("x")))[:-3], "broken", "too early"),
        (answer(sse({"error": {"message": "no"}})), "in the stream", "no"),
        (answer(b"data: [1]\n\n"), "broken", "not a completion"),
        (answer(b'data: {"choices": [7]}\n\n'), "broken", "not a completion"),
        (b"SSH-2.0-OpenSSH\r\n", "broken", "not HTTP"),
        (b"", "broken", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "broken", ""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-\r\n", "broken", ""),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (3 << 20), "broken", "longer than"),
    ],
)
def test_bad_answers_are_counted_by_kind(said, error, detail):
    [reply], _ = ask(lambda *_: said)
    assert reply.error == error
    assert detail in reply.detail
    assert summary([reply])["errors"] == ({error: 1} if error else {})


def test_nobody_there_and_nobody_answering():
    with serving(lambda *_: b"") as fake:
        gone = ServerAddress.parse(fake.url)
    send = sender(gone, lambda n: {"prompt": "x"}, 5.0)
    assert asyncio.run(send(0, 0.0)).error == "connection"
    with pytest.raises(PacelineError, match="cannot reach 127"):
        asyncio.run(first_model(gone))

    async def listens(reader, writer):
        while await reader.read(1000):
            pass
        writer.close()

    async def silent():
        server = await asyncio.start_server(listens, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        send = sender(ServerAddress("127.0.0.1", port, "/v1"), lambda n: {"prompt": "x"}, 0.05)
        async with server:
            reply = await send(0, 0.0)
            await asyncio.sleep(0.01)  # the server sees that its client left
        return reply

    assert asyncio.run(silent()).error == "timeout"


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "http://", "http://u:p@x", "http://x:99999", "http://x/?a=b", "http://é"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(RequestError, match="is not an address"):
        ServerAddress.parse(url)


def test_addresses():
    assert ServerAddress.parse("127.0.0.1:80").path == "/v1"
    assert ServerAddress.parse("https://x.org/api/v1/") == ServerAddress(
        "x.org", 443, "/api/v1", True
    )
    with pytest.raises(RequestError, match="HTTP header"):
        ServerAddress.parse("x", "a\r\nb")


def test_a_servers_first_model_is_found():
    async def model(url):
        return await first_model(ServerAddress.parse(url))

    with serving(lambda *_: answer(b'{"data": [{"id": "tiny"}]}')) as fake:
        assert asyncio.run(model(fake.url)) == "tiny"
    with serving(lambda *_: answer(b"{}")) as fake, pytest.raises(PacelineError, match="no model"):
        asyncio.run(model(fake.url))
    with serving(lambda *_: answer(b"{}", 401)) as fake, pytest.raises(PacelineError, match="401"):
        asyncio.run(model(fake.url))
