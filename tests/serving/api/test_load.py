"""`paceline load-test` against our own server."""

import asyncio

from paceline.measuring.load.client import ServerAddress
from paceline.measuring.load.run import Traffic, drive, first_model, sender, summary


def test_our_own_server_under_load(address, lm):
    server = ServerAddress.parse(address)
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 12,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def run(traffic):
        name = await first_model(server)
        send = sender(server, lambda number: body | {"model": name, "seed": number}, 60.0)
        return await drive(send, traffic)

    for traffic in (Traffic(users=3, requests=9), Traffic(rate=40.0, requests=9)):
        replies = asyncio.run(run(traffic))
        found = summary(replies)
        assert found["completed"] == 9
        assert found["tokens"] == 9 * 12
        assert found["tokens_counted_by"] == "server"
        for reply in replies:
            assert reply.due <= reply.sent <= reply.pieces[0]
            assert reply.pieces == sorted(reply.pieces)
            assert 1 <= len(reply.pieces) <= 12


def test_a_refusal_of_our_server_is_told(address):
    send = sender(ServerAddress.parse(address), lambda number: {"prompt": "x", "best": 1}, 60.0)
    reply = asyncio.run(send(0, 0.0))
    assert (reply.error, reply.tokens) == ("400", None)
    assert "best" in reply.detail
