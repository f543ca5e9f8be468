"""Prompts that another process has read: the same answers, and nothing is read again."""

import shutil

import pytest

from paceline import LM
from paceline.errors import CombinationError, RequestError
from paceline.serving.messages import Job
from paceline.serving.worker import Worker
from tests.conftest import shared

TEXT = "Once upon a time there was a little dog who liked to play with a red ball. " * 8


def opened(folder=None, **options):
    options = {"threads": 2, "drafter": "recycle", "budget": 4, **options}
    return LM(shared("models", "stories260K"), prefix_cache_dir=folder, **options)


@pytest.mark.parametrize("kv_format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("drafter", ["plain", "lookup", "blend"])
def test_a_second_process_answers_alike_without_reading_the_prompt(tmp_path, kv_format, drafter):
    options = {"kv_format": kv_format, "drafter": drafter}
    prompts = [TEXT + end for end in ("The cat", "A tree and", "")]
    wanted = {"max_new_tokens": 30, "temperature": 0.8, "seed": 3}
    with opened(**options) as lm:
        plain = [lm.generate(each, **wanted) for each in prompts]
        size = len(lm.encode(TEXT + "A tree and"))
    assert [output.cached_tokens for output in plain] == [0, 0, 0]
    with opened(tmp_path, **options) as lm:
        first = lm.generate(prompts[0], **wanted)
    assert first.cached_tokens == 0
    with opened(tmp_path, **options) as lm:
        again = [lm.generate(each, **wanted) for each in prompts]
        batch = lm.generate(prompts, **wanted)
        assert lm.engine.memory.used == 0
    assert [output.tokens for output in [*again, *batch]] == 2 * [each.tokens for each in plain]
    assert all(output.cached_tokens >= size // 64 * 64 - 64 > 0 for output in again)


def test_a_prompt_of_whole_pages_keeps_its_last_token_for_the_pass(tmp_path):
    tokens = list(range(3, 3 + 129))
    for size in (128, 129, 64, 65, 1):
        with opened(tmp_path, drafter="plain") as lm:
            lm.generate(tokens[:size], max_new_tokens=5)
        with opened(tmp_path, drafter="plain") as lm:
            found = lm.generate(tokens[:size], max_new_tokens=5)
        with opened(drafter="plain") as lm:
            assert found.tokens == lm.generate(tokens[:size], max_new_tokens=5).tokens
        assert found.cached_tokens == (size - 1) // 64 * 64


def test_requests_under_a_policy_store_and_read_nothing(tmp_path):
    with opened(tmp_path, drafter="plain") as lm:
        bounded = lm.generate(TEXT, max_new_tokens=5, kv_policy="sliding_window")
        assert lm.pages.flush()
        assert lm.pages.statistics.written_pages == 0
        lm.generate(TEXT, max_new_tokens=5)
        again = lm.generate(TEXT, max_new_tokens=5, kv_policy="sliding_window")
        assert (again.cached_tokens, again.tokens) == (0, bounded.tokens)


def test_arguments_that_cannot_be_are_refused(tmp_path):
    for folder, limit in ((3, 10**9), (tmp_path, -1), (tmp_path, 1.5), (tmp_path, True)):
        with pytest.raises(RequestError, match="prefix_cache_"):
            opened(folder, prefix_cache_bytes=limit)
    with pytest.raises(CombinationError, match="the engine reference"):
        opened(tmp_path, engine="reference", threads=None)


def test_a_changed_checkpoint_is_another_model(tmp_path):

    copy = shutil.copytree(shared("models", "stories260K"), tmp_path / "copy")
    options = {"threads": 1, "drafter": "plain", "prefix_cache_dir": tmp_path / "cache"}
    with LM(copy, **options) as lm:
        lm.generate(TEXT, max_new_tokens=3)
    [weights] = copy.glob("*.safetensors")
    with weights.open("r+b") as file:  # one bit in the middle, as no time or size would show
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with LM(copy, **options) as lm:
        assert lm.generate(TEXT, max_new_tokens=3).cached_tokens == 0


def finished(worker, prompts):
    """The last events of requests that run side by side."""
    last = {}
    for place, tokens in enumerate(prompts):
        worker.submit(Job(str(place), worker.lm.request(tokens, max_new_tokens=12)))
    while not worker.idle:
        last |= {event.id: event for event in worker.step() if event.finish}
    return [last[str(place)] for place in range(len(prompts))]


@pytest.mark.parametrize("pages", [None, 24])
def test_a_worker_reads_what_another_has_written(tmp_path, pages):
    prompts = [list(range(5, 205)), list(range(5, 170)) + [9] * 60, [7] * 30 + list(range(90))]
    events = []
    for round_ in range(3):
        with opened(tmp_path if round_ else None, drafter="plain") as lm:
            memory = pages and pages * lm.engine.memory.page_bytes
            worker = Worker(lm, memory=memory, prefix_cache=0.2)
            events.append(finished(worker, prompts))
            assert round_ == 0 or lm.pages.flush()
            worker.close()
            assert lm.engine.memory.used == 0
    texts = [[event.output.tokens for event in each] for each in events]
    assert texts[0] == texts[1] == texts[2]
    if pages is None:  # where memory is short, texts that wait to be written give way
        assert [event.cached for event in events[2]] == [192, 192, 64]
