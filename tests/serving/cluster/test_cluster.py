"""Two nodes of Ray on this machine, one of which is killed: nothing is lost or comes twice."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import pytest

from paceline import LM
from paceline.cli.pipeline import pipeline_of
from paceline.measuring.load.client import ServerAddress, request
from paceline.serving.settings import ServerSettings

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
    words = ["--ray", nodes.address, "--replicas", "2", "--max-running", "2", "--threads", "1"]
    process = subprocess.Popen(
        [*PACELINE, "batch", source, output, *words, "--budget", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    part = tmp_path / "out.jsonl.part"
    with process:
        while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 3):
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read().decode()
        killed_at = part.read_bytes().count(b"\n")
        kill(nodes, other)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
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


def test_a_pipeline_outlives_a_node(nodes, lm):
    other = nodes.add_node(**nodes.small)
    options = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0.9, "seed": 5}
    wanted = lm.generate(BODY["prompt"], **options).tokens
    settings = ServerSettings(pipeline=2, ray=nodes.address)
    with pipeline_of(settings) as pipeline, LM(pipeline=pipeline, threads=1) as split:
        assert split.generate(BODY["prompt"], **options).tokens == wanted
        kill(nodes, other)
        until(lambda: split.engine._stages[0].lost)  # its process outlives its node for a while
        assert split.generate(BODY["prompt"], **options).tokens == wanted
        assert split.engine.replaced >= 1


def test_a_server_outlives_a_node(nodes, lm):
    other = nodes.add_node(**nodes.small)
    words = ["--replicas", "2", "--ray", nodes.address, "--port", "0", "--threads", "1"]
    words += ["--token-rate", "100"]
    process = subprocess.Popen(
        [*PACELINE, "serve", *words, "--budget", "0", "--name", "tiny", "--drain", "5"],
        stderr=subprocess.PIPE,
        text=True,
    )
    reported = []
    listens = threading.Event()

    def read():
        for line in process.stderr:
            reported.append(line)
            if "2 times 1 threads" in line:
                listens.set()
        listens.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listens.wait(120)
        assert process.poll() is None, reported
        server = ServerAddress.parse(
            next(line for line in reported if "2 times" in line).split()[3][:-1]
        )
        address = f"http://{server.host}:{server.port}"
        assert ready(address) == (200, 2)
        asyncio.run(asked_while_a_node_dies(server, lm, lambda: kill(nodes, other)))
        state_of_the_whole(address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reader.join()
        assert any("is retried" in line for line in reported), reported
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def ready(address):
    found = httpx.get(f"{address}/ready")
    assert found.json()["wanted"] == 2
    return found.status_code, found.json()["replicas"]


def until(true):
    while not true():  # the test's time limit ends it
        time.sleep(0.1)


def state_of_the_whole(address):
    """One node is left, which bears one of two replicas."""
    until(lambda: ready(address) == (200, 1))
    text = httpx.get(f"{address}/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert found["paceline_replicas"] == "1.0"
    assert found['paceline_requests_total{path="/v1/completions",status="200"}'] == "12.0"
    assert float(found["paceline_moved_requests_total"]) > 0
    assert float(found["paceline_generated_tokens_total"]) > 0
    assert len([name for name in found if name.startswith("paceline_running{replica=")]) == 1
    body = {"prompt": "a", "max_tokens": 1}
    until(lambda: httpx.post(f"{address}/v1/completions", json=body).status_code == 429)


async def asked_while_a_node_dies(server, lm, die):
    begun = asyncio.Event()

    async def asked(seed, stream):
        body = BODY | {"seed": seed, "stream": stream, "prompt": f"{seed} dogs"}  # on both nodes
        if seed % 3 == 0:
            body |= {"logprobs": 1, "trace": stream}
        drawn = []
        async with request(server, "/completions", body) as answer:
            assert answer.status == 200
            if not stream:
                return (await answer.json())["choices"][0]["text"]
            text = ""
            async for line in answer.lines:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    assert "error" not in piece
                    drawn += piece.get("paceline", {}).get("tokens", ())
                    text += "".join(choice["text"] for choice in piece["choices"])
                    if len(text) > 100:
                        begun.set()
            assert len(drawn) == (300 if "logprobs" in body else 0)
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
