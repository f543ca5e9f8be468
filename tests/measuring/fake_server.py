"""A server that does to each request what its script says."""

import asyncio
import contextlib
import json
import threading


def sse(*pieces, done=True):
    lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def piece(text, finish=None, **more):
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def answer(body, status=200, how="length"):
    """An answer in any of the ways to tell a body's end."""
    head = f"HTTP/1.1 {status} Said\r\n"
    if how == "length":
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if how == "close":
        return f"{head}\r\n".encode() + body
    parts = [body[at : at + 7] for at in range(0, len(body), 7)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


class FakeServer:
    """Answers request N with `script(N, body)`; keeps what it was asked."""

    def __init__(self, script):
        self.script, self.asked, self.serving = script, [], set()

    async def _serve(self, reader, writer):
        self.serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
            text = await reader.readexactly(int(fields.get("content-length", 0)))
            body = json.loads(text) if text else None
            number = len(self.asked)
            self.asked.append((head.split("\r\n")[0], fields, body))
            writer.write(self.script(number, body))
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.contextmanager
def serving(script):
    """A server in a thread of its own, and its address."""
    fake, loop, ready = FakeServer(script), asyncio.new_event_loop(), threading.Event()

    async def work():
        fake.stop = asyncio.Event()
        server = await asyncio.start_server(fake._serve, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        async with server:
            await fake.stop.wait()
        await asyncio.gather(*fake.serving)

    thread = threading.Thread(target=loop.run_until_complete, args=(work(),))
    thread.start()
    ready.wait()
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(fake.stop.set)
        thread.join()
        loop.close()
