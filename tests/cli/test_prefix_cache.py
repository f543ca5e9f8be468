"""The prefix cache on disk from the command line, and through a server that is started again."""

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from tests.cli.test_serve import started
from tests.conftest import shared

TEXT = "Once upon a time there was a little dog who liked to play with a red ball. " * 8
MODEL = "stories260K"
FOLDER = object()


def test_generate_and_doctor_say_what_is_stored(tmp_path, paceline):
    words = ["generate", TEXT, "--max-new-tokens", 3, "--json", "--model",
             shared("models", MODEL)]  # fmt: skip
    found = [paceline(*words, "--prefix-cache-dir", tmp_path).json for _ in range(2)]
    assert [each["cached_tokens"] > 0 for each in found] == [False, True]
    assert found[0]["tokens"] == found[1]["tokens"]
    doctor = paceline("doctor", "--prefix-cache-dir", tmp_path, "--json").json
    assert doctor["prefix_cache"]["models"] == 1
    assert doctor["prefix_cache"]["pages"] == found[1]["cached_tokens"] // 64
    assert "prefix cache" in paceline("doctor", "--prefix-cache-dir", tmp_path).out
    assert "is no folder" in paceline("doctor", "--prefix-cache-dir", tmp_path / "x").err
    done = paceline(*words, "--prefix-cache-dir", tmp_path, "--prefix-cache-bytes", "much")
    assert done.code == 2
    assert "--prefix-cache-bytes is 'much': expected a size" in done.err


def test_a_process_ends_without_a_word_about_memory(tmp_path):
    code = (
        "from paceline import LM\n"
        f"lm = LM({str(shared('models', MODEL))!r}, prefix_cache_dir={str(tmp_path)!r})\n"
        f"print(lm.generate({TEXT!r}, max_new_tokens=2).cached_tokens)"
    )
    for cached in (False, True):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (int(done.stdout) > 64, done.stderr, done.returncode) == (cached, "", 0)


def test_talks_use_the_folder(tmp_path, paceline):
    words = ["chat", "--template", TEXT + "{user}", "--max-new-tokens", 3, "--json",
             "--model", shared("models", MODEL), "--prefix-cache-dir", tmp_path]  # fmt: skip
    found = [paceline(*words, stdin="Hi\n").json["turns"][0] for _ in range(2)]
    assert [each["cached_tokens"] > 64 for each in found] == [False, True]
    assert found[0]["tokens"] == found[1]["tokens"]


def ask(address, **more):
    body = {"prompt": TEXT, "max_tokens": 20, "temperature": 0.9, "seed": 5, **more}
    reply = httpx.post(f"{address}/v1/completions", json=body, timeout=100).json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def figures(address):
    text = httpx.get(f"{address}/metrics").text
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")


@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
def test_a_server_that_is_started_again_need_not_read_a_prompt(kv_format, tmp_path):
    words = ["--model", str(shared("models", MODEL)), "--kv-format", kv_format]
    found = []
    for more in ([], *2 * [["--prefix-cache-dir", str(tmp_path)]]):
        with started(*words, *more) as server:
            address = next(re.search(r"http://\S+", line)[0] for line in server.stderr
                           if "http://" in line)  # fmt: skip
            with ThreadPoolExecutor(1) as pool:
                log = pool.submit(list, server.stderr)
                found.append((*ask(address), figures(address)))
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
                assert not [line for line in log.result() if "prefix cache" in line]
    assert len({text for text, _, _ in found}) == 1
    cached = found[2][1]
    assert [each[1] for each in found] == [0, 0, cached]
    assert cached > 64
    assert cached % 64 == 0
    numbers = found[2][2]
    assert float(numbers["paceline_stored_pages_read_total"]) == cached // 64
    assert float(numbers["paceline_stored_pages_unusable_total"]) == 0
    assert not [name for name in found[0][2] if "stored" in name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prefix-cache-dir", __file__], "cannot hold a prefix cache: .*; name one that can"),
        (["--prefix-cache-dir", FOLDER, "--prefix-cache-bytes", "9"], "of 9 bytes holds no page"),
        (["--prefix-cache-bytes", "much"], "prefix_cache_bytes is 'much': expected a size"),
        (["--prefix-cache-dir", FOLDER, "--engine", "reference"], "the engine reference do not go"),
        (
            ["--prefix-cache-dir", FOLDER, "--kv-policy", "sliding_window"],
            "--prefix-cache-dir and the KV policy sliding_window do not go together",
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(paceline, tmp_path, words, said):
    done = paceline("serve", *(tmp_path if word is FOLDER else word for word in words))
    assert done.code == 2
    assert re.search(said, done.err)
    assert done.err.count("\n") == 1
