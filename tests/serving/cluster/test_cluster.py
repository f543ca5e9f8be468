"""Two nodes of Ray on this machine, one of which is killed: nothing is lost or comes twice."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from paceline import LM
from paceline.measuring.http import Server, request

pytest.importorskip("ray", reason="Ray is not installed: pip install 'paceline[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

PACELINE = [sys.executable, "-c", "from paceline.cli import main; main()"]
BODY = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "temperature": 0.9}


@pytest.fixture(scope="module")
def lm():
    return LM()


@pytest.fixture(scope="module")
def nodes():
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    found = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    found.small = small
    yield found
    found.shutdown()


def kill(nodes, node):
    nodes.remove_node(node, allow_graceful=False)


def expected(lm, seed, prompt=BODY["prompt"]):
    return lm.generate(prompt, max_new_tokens=300, ignore_eos=True, temperature=0.9, seed=seed).text


def test_a_batch_outlives_a_node(nodes, lm, tmp_path):
    other = nodes.add_node(**nodes.small)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(BODY | {"seed": seed}) for seed in range(48)]
    lines[5], lines[9] = "oops", ""
    source.write_text("\n".join(lines))
    words = ["--ray", nodes.address, "--replicas", "2", "--places", "2", "--threads", "1"]
    process = subprocess.Popen(
        [*PACELINE, "batch", source, output, *words, "--budget", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    part = tmp_path / "out.jsonl.part"
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read().decode()
    killed_at = part.read_bytes().count(b"\n")
    kill(nodes, other)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err.decode()
    found = json.loads(out)
    assert (found["lines"], found["failed"]) == (47, 1)
    assert killed_at < 47
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    numbers = [n for n in range(1, 49) if n != 10]
    assert [row["id"] for row in rows] == [f"batch_req_{n}" for n in numbers]
    for number, row in zip(numbers, rows, strict=True):
        if number == 6:
            assert "not JSON" in row["error"]["message"]
        else:
            text = row["response"]["body"]["choices"][0]["text"]
            assert text == expected(lm, number - 1)


def test_a_server_outlives_a_node(nodes, lm):
    other = nodes.add_node(**nodes.small)
    words = ["--replicas", "2", "--ray", nodes.address, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*PACELINE, "serve", *words, "--budget", "0", "--name", "tiny", "--drain", "5"],
        stderr=subprocess.PIPE,
        text=True,
    )
    told = []
    listens = threading.Event()

    def read():
        for line in process.stderr:
            told.append(line)
            if "2 times 1 threads" in line:
                listens.set()
        listens.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listens.wait(120)
        assert process.poll() is None, told
        server = Server.parse(next(line for line in told if "2 times" in line).split()[3][:-1])
        asyncio.run(asked_while_a_node_dies(server, lm, lambda: kill(nodes, other)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reader.join()
        assert any("is tried again" in line for line in told), told
    finally:
        process.kill()
        reader.join()


async def asked_while_a_node_dies(server, lm, die):
    begun = asyncio.Event()

    async def asked(seed, stream):
        body = BODY | {"seed": seed, "stream": stream, "prompt": f"{seed} dogs"}  # on both nodes
        async with request(server, "/completions", body) as answer:
            assert answer.status == 200
            if not stream:
                return (await answer.json())["choices"][0]["text"]
            text = ""
            async for line in answer.lines:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    assert "error" not in piece
                    text += "".join(choice["text"] for choice in piece["choices"])
                    if len(text) > 100:
                        begun.set()
            return text

    tasks = [asyncio.create_task(asked(seed, seed % 2 == 0)) for seed in range(12)]
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await asyncio.to_thread(die)
    texts = await asyncio.gather(*tasks)
    assert texts == [expected(lm, seed, f"{seed} dogs") for seed in range(12)]


def test_no_cluster_is_told_in_a_sentence(tmp_path):
    (tmp_path / "in").write_text('{"prompt": "Once"}')
    done = subprocess.run(
        [*PACELINE, "batch", tmp_path / "in", tmp_path / "out", "--ray", "127.0.0.1:1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "cannot join the Ray cluster at 127.0.0.1:1" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
