"""`paceline serve` as a process: its start, its promise of memory, and its end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx
import pytest

from paceline import LM
from tests.conftest import shared

OPENING = "Once upon a time"
PROGRAM = [sys.executable, "-c", "from paceline.cli import main; main()", "serve", "--port", "0"]


@contextlib.contextmanager
def started(*words):
    """A server process that does not outlive the test."""
    with subprocess.Popen([*PROGRAM, *words], stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def resident(pid):
    """Most memory that a process had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024


def least_memory(*words):
    """MB that the smallest server needs."""
    done = subprocess.run([*PROGRAM, "--memory", "1MB", *words], capture_output=True, text=True)
    assert done.returncode == 2
    return int(re.search(r"(\d+) MB is the least", done.stderr)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("draft", [None, "stories260K"])
def test_a_server_keeps_its_promise_of_memory_and_ends_well(draft):
    words = ["--max-running", "8"]
    if draft:
        words += ["--drafter", f"model:path={shared('models', draft)}", "--budget", "6"]
    promise = least_memory(*words) + 4  # a few pages: less than eight long answers want
    words += ["--memory", f"{promise}MB", "--drain", "600"]
    with started(*words) as server:
        said = next(server.stderr)
        log = []
        reader = threading.Thread(target=lambda: log.extend(server.stderr))
        reader.start()
        address = re.search(r"http://\S+", said)[0]
        body = {"prompt": OPENING, "max_tokens": 300, "ignore_eos": True, "temperature": 1.0}
        for seed in (0, 100):
            every = body | {"n": 8, "seed": seed}
            found = httpx.post(f"{address}/v1/completions", json=every, timeout=100)
            assert found.json()["usage"]["completion_tokens"] == 8 * 300
        metrics = httpx.get(f"{address}/metrics").text
        figures = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
        used, limit = (float(figures[f"paceline_kv_pages_{each}"]) for each in ("used", "limit"))
        assert 0 < used <= limit
        assert float(figures["paceline_preemptions_total"]) > 0  # it was tight
        assert resident(server.pid) < promise * 1e6
        with httpx.stream(
            "POST", f"{address}/v1/completions", json=body | {"stream": True}, timeout=100
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(60) == 0
        reader.join()
    assert all(json.loads(line)["event"] == "request" for line in log)
    assert OPENING not in "".join(log)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "20MB"], r"20 MB of memory are too few: the model takes \d+ MB"),
        (["--memory", "much"], "memory is 'much': expected a size"),
        (["--config", "/nowhere.toml"], "cannot read the settings in /nowhere.toml"),
        (["--keys-file", "/nowhere"], "cannot read the API keys in /nowhere"),
        (["--prefill-slowdown", "0"], "prefill_slowdown is 0.0, expected 1 or more"),
        (["--attention", "quset"], "unknown attention pattern 'quset'; did you mean quest"),
        (["--attention", "lm_infinite"], "the attention pattern lm_infinite do not go together"),
        (["--attention", "quest", "--kv-policy", "h2o"], "h2o and the attention pattern quest do"),
        (
            ["--attention", "quest", "--prefix-cache-dir", "/nowhere"],
            "the prefix cache on disk and the attention pattern quest do not go together",
        ),
        (
            ["--attention", "quest", "--chunk-cache", "/nowhere"],
            "documents and the attention pattern quest do not go together",
        ),
        (["--watermark", "kind=green"], "a watermark needs a key"),
        (["--watermark", "key=a,kind=gren"], "unknown watermark 'gren'; did you mean green"),
        (["--guides", "cfg"], "guides has 'cfg', expected NAME=GUIDE"),
        (["--guides", "a=proxy:/nowhere,/nowhere"], "/nowhere"),
        (["--guides", "a=dola:layers=99"], "the guide a: dola:layers is '99'"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1:8000"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(paceline, words, said):
    done = paceline("serve", *words)
    assert done.code == 2
    assert re.search(said, done.err)
    assert done.err.count("\n") == 1


def test_show_config_prints_what_would_be_used(paceline, tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text("port = 1\nqueue = 5\n")
    monkeypatch.setenv("PACELINE_SERVE_KEYS", "ann:secret-of-ann")
    monkeypatch.setenv("PACELINE_SERVE_PORT", "2")
    done = paceline("serve", "--config", file, "--places", "3", "--log-prompts", "--show-config")
    shown = done.json
    assert (shown["port"], shown["queue"], shown["max_running"]) == (2, 5, 3)
    assert (shown["log_prompts"], shown["keys"], shown["prefill_slowdown"]) == (True, ["ann"], 2.0)
    assert "secret" not in done.out
    monkeypatch.setenv("PACELINE_SERVE_POTR", "2")
    assert "PACELINE_SERVE_PORT" in paceline("serve", "--show-config").err


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_the_key_of_a_watermark_is_not_shown(paceline, tmp_path, monkeypatch, source):
    words, secret = [], "key=s3cret,kind=green,delta=3"
    if source == "flag":
        words = ["--watermark", secret]
    elif source == "variable":
        monkeypatch.setenv("PACELINE_SERVE_WATERMARK", secret)
    else:
        file = tmp_path / "serve.json"
        file.write_text(json.dumps({"watermark": secret}))
        words = ["--config", file]
    done = paceline("serve", *words, "--show-config")
    assert done.json["watermark"] == "key=***,kind=green,gamma=0.25,delta=3.0,context=1"
    assert "s3cret" not in done.out + done.err
    wrong = paceline("serve", "--watermark", "s3cret")
    assert wrong.code == 2
    assert "s3cret" not in wrong.err


def test_what_steers_answers_reaches_them(paceline, monkeypatch):
    from paceline.serving.api import server

    found = []
    run = lambda self, sockets: found.append(self.config.app.state.context.limits)  # noqa: E731
    monkeypatch.setattr(server.DrainingServer, "run", run)
    guides = "calm=cfg:negative=A quarrel,scale=2;deep=dola:layers=1"
    words = ["--watermark", "key=a,kind=green", "--watermark-choice", "--guides", guides]
    assert paceline("serve", "--port", "0", *words).code == 0
    steering = found[0].steering
    assert (steering.watermark.name, steering.watermark.key, steering.choice) == (
        "green",
        "a",
        True,
    )
    assert [type(guide).name for guide in steering.guides.values()] == ["cfg", "dola"]


def test_answers_read_by_the_attention_pattern_of_the_server(paceline, monkeypatch):
    from paceline.serving.api import server

    found = []
    run = lambda self, sockets: found.append(self.config.app.state.context.service)  # noqa: E731
    monkeypatch.setattr(server.DrainingServer, "run", run)
    assert paceline("serve", "--port", "0", "--attention", "quest:share=0.5").code == 0
    assert found[0].worker.lm.engine.pattern.share == 0.5


def test_an_open_server_elsewhere_says_so(monkeypatch, paceline):
    from paceline.serving.api import server

    monkeypatch.setattr(server.DrainingServer, "run", lambda self, sockets: None)
    open_ = paceline("serve", "--host", "0.0.0.0", "--port", "0")
    assert "whoever reaches 0.0.0.0 may use it: there are no API keys" in open_.err
    monkeypatch.setenv("PACELINE_SERVE_KEYS", "ann:secret-of-ann")
    assert "whoever" not in paceline("serve", "--host", "0.0.0.0", "--port", "0").err
    monkeypatch.delenv("PACELINE_SERVE_KEYS")
    assert "whoever" not in paceline("serve", "--port", "0").err


def test_earlier_names_of_settings_are_understood(paceline, monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_SERVE_PREFIXES", "0.25")
    file = tmp_path / "serve.toml"
    file.write_text("stall = 3\n")
    done = paceline("serve", "--config", file, "--places", "3", "--show-config")
    shown = done.json
    assert (shown["max_running"], shown["prefill_slowdown"], shown["prefix_cache"]) == (
        3,
        3.0,
        0.25,
    )
    assert "--places" not in paceline("serve", "--help").out
    file.write_text("stall = 3\nprefill_slowdown = 2\n")
    assert "keep prefill_slowdown" in paceline("serve", "--config", file, "--show-config").err
    monkeypatch.setenv("PACELINE_SERVE_PREFIX_CACHE", "0.5")
    assert "keep the second" in paceline("serve", "--show-config").err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_layers_on_two_nodes_answer_as_one_machine_does_though_one_is_killed():
    body = {"prompt": OPENING, "max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "n": 4}
    with LM(budget=0) as lm:
        options = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 1.0}
        expected = [lm.generate(OPENING, seed=seed, **options).text for seed in range(3, 7)]
    with started("--pipeline", "2", "--drain", "600") as server:
        said = next(line for line in server.stderr if "serving" in line)
        log = []
        reader = threading.Thread(target=lambda: log.extend(server.stderr))
        reader.start()
        address = re.search(r"http://\S+", said)[0]
        nodes = set()
        for killed in (False, True):
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            nodes |= set(children)
            with httpx.stream(
                "POST",
                f"{address}/v1/completions",
                json=body | {"seed": 3, "stream": True},
                timeout=120,
            ) as stream:
                texts = [""] * 4
                for line in filter(None, stream.iter_lines()):
                    if killed and children:
                        os.kill(int(children.pop()), signal.SIGKILL)
                    if line != "data: [DONE]":
                        [choice] = json.loads(line[6:])["choices"]
                        texts[choice["index"]] += choice["text"]
            assert texts == expected
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        reader.join()
    assert len(nodes) == 1
    assert not any(Path(f"/proc/{node}").exists() for node in nodes), log


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_prompts_read_by_another_process_are_answered_as_by_one():
    body = {"prompt": OPENING * 20, "max_tokens": 20, "ignore_eos": True, "seed": 3}
    with LM(budget=0) as lm:
        options = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 1.0, "seed": 3}
        expected = lm.generate(body["prompt"], **options).text
    words = ("--prefill-replicas", "1", "--prefill-threshold", "64", "--drain", "600")
    with started(*words) as server:
        said = next(line for line in server.stderr if "serving" in line)
        address = re.search(r"http://\S+", said)[0]
        log = []
        reader = threading.Thread(target=lambda: log.extend(server.stderr))
        reader.start()
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        for killed in (False, True):
            if killed:
                os.kill(int(children[0]), signal.SIGKILL)
                body["prompt"] = "And " + body["prompt"]
                with LM(budget=0) as lm:
                    expected = lm.generate(body["prompt"], **options).text
            reply = httpx.post(
                f"{address}/v1/completions", json=body | {"temperature": 1.0}, timeout=120
            )
            assert reply.json()["choices"][0]["text"] == expected
            metrics = httpx.get(f"{address}/metrics").text
            if not killed:
                assert "paceline_prefill_replicas 1.0" in metrics
                assert "paceline_prefill_apart_prompts_total 1.0" in metrics
                pages = re.search(r"paceline_prefill_apart_pages_total (\d\S*)", metrics)[1]
                size = re.search(r"paceline_kv_page_bytes (\d\S*)", metrics)[1]
                taken = re.search(r"prefill_apart_received_bytes_total (\d\S*)", metrics)[1]
                assert float(taken) == float(pages) * float(size) > 0
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        reader.join()
    assert not any(Path(f"/proc/{child}").exists() for child in children), log


def test_prefill_replicas_and_whole_servers_are_refused(paceline):
    done = paceline("serve", "--prefill-replicas", "1", "--replicas", "2")
    assert (done.code, "replicas are whole servers" in done.err) == (2, True)
    done = paceline("serve", "--prefill-replicas", "1", "--kv-policy", "tova", "--port", "0")
    assert (done.code, "prefill replicas and the KV policy tova" in done.err) == (2, True)
    done = paceline("serve", "--prefill-replicas", "65")
    assert (done.code, "prefill_replicas is 65" in done.err) == (2, True)
