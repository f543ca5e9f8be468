"""The worker's thread: many streams, leavers, failures, and an end."""

import asyncio
import threading
from dataclasses import fields, replace

import pytest

from paceline import LM
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.errors import RequestError
from paceline.serving.messages import Job, JobEvent
from paceline.serving.scheduler import BusyError
from paceline.serving.service import Mailbox, Service
from paceline.serving.worker import Worker
from tests.serving.halting import halt


@pytest.fixture(scope="module")
def lm():
    return LM()


@pytest.fixture
def service(lm):
    found = Service(Worker(lm, queue=40))
    found.start()
    yield found
    found.stop()
    assert not [t for t in threading.enumerate() if t.name == "paceline-worker"]


def alone(lm, request):
    drafter = lm.drafter_method.build(lm.draft_target)
    return Generation(lm.engine, drafter, request, Fixed(0)).run().tokens


async def tokens_of(service, job):
    return [token async for event in await service.stream(job) for token in event.tokens]


def test_many_streams_at_once(lm, service):
    requests = [
        lm.request("Once upon a time", max_new_tokens=5 + n % 20, temperature=0.9, seed=n)
        for n in range(24)
    ]

    async def everybody():
        jobs = [Job(str(n), request) for n, request in enumerate(requests)]
        return await asyncio.gather(*(tokens_of(service, job) for job in jobs))

    found = asyncio.run(everybody())
    assert found == [alone(lm, request) for request in requests]
    assert service.worker.idle


def test_who_stops_listening_is_gone(lm, service, monkeypatch):
    halt(monkeypatch, service.worker)
    request = lm.request("Once upon a time", max_new_tokens=1000, ignore_eos=True)

    async def leave():
        events = await service.stream(Job("leaves", request))
        async for _ in events:
            break
        await events.aclose()
        while not service.worker.idle:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert not service._sinks


def test_refusals_reach_the_caller(lm, service):
    request = lm.request("Once", max_new_tokens=2)
    with pytest.raises(RequestError, match="prompt is empty"):
        asyncio.run(tokens_of(service, Job("bad", replace(request, prompt=()))))
    long = lm.request("Once", max_new_tokens=1000, ignore_eos=True)

    async def too_many():
        streams = await asyncio.gather(
            *(service.stream(Job(str(n), long)) for n in range(90)), return_exceptions=True
        )
        busy = [each for each in streams if isinstance(each, BusyError)]
        for each in streams:
            if not isinstance(each, Exception):
                await each.aclose()
        return len(busy)

    assert asyncio.run(too_many()) > 0


def test_a_bug_in_a_pass_fails_those_under_way_and_no_others(lm, service, monkeypatch):
    request = lm.request("Once upon a time", max_new_tokens=30)
    step = service.worker.step

    def broken():
        monkeypatch.setattr(service.worker, "step", step)
        raise ZeroDivisionError

    monkeypatch.setattr(service.worker, "step", broken)

    async def two():
        first = [event async for event in await service.stream(Job("a", request))]
        return first, await tokens_of(service, Job("b", request))

    first, second = asyncio.run(two())
    assert [(event.finish, bool(event.error)) for event in first] == [("error", True)]
    assert second == alone(lm, request)
    assert service.failures == 1


def test_stopping_lets_those_under_way_finish_and_takes_no_more(lm):
    service = Service(Worker(lm))
    service.start()
    request = lm.request("Once upon a time", max_new_tokens=300, ignore_eos=True)

    async def run():
        events = await service.stream(Job("a", request))
        stopping = asyncio.create_task(asyncio.to_thread(service.stop, 60.0))
        while not service.draining:
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="shutting down"):
            await service.stream(Job("b", request))
        tokens = [token async for event in events for token in event.tokens]
        await stopping
        return tokens

    assert asyncio.run(run()) == alone(lm, request)
    assert not service.ready
    with pytest.raises(BusyError, match="shutting down"):
        asyncio.run(service.stream(Job("c", request)))


def test_stopping_at_once_tells_those_under_way(lm, monkeypatch):
    service = Service(Worker(lm))
    halt(monkeypatch, service.worker)
    service.start()
    request = lm.request("Once upon a time", max_new_tokens=900, ignore_eos=True)

    async def run():
        events = await service.stream(Job("a", request))
        await asyncio.to_thread(service.stop)
        return [event.finish async for event in events][-1]

    assert asyncio.run(run()) == "cancelled"


def test_a_stream_that_nobody_begins_is_cancelled(lm, service, monkeypatch):
    halt(monkeypatch, service.worker)
    request = lm.request("Once upon a time", max_new_tokens=1000, ignore_eos=True)

    async def leave():
        closed = await service.stream(Job("closed", request))
        await closed.aclose()
        let_go = await service.stream(Job("let go", request))
        del let_go
        while service._sinks or not service.worker.idle:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_a_name_that_is_taken_harms_nobody(lm, service, monkeypatch):
    request = lm.request("Once upon a time", max_new_tokens=60, ignore_eos=True)
    refused = threading.Event()
    halt(monkeypatch, service.worker, until=refused.is_set)

    async def twice():
        first = await service.stream(Job("a", request))
        with pytest.raises(RequestError, match="'a' is running"):
            await service.stream(Job("a", request))
        refused.set()
        return [token async for event in first for token in event.tokens]

    assert asyncio.run(asyncio.wait_for(twice(), 20)) == alone(lm, request)


def test_a_bug_in_taking_a_request_is_told_to_its_owner_alone(lm, service, monkeypatch, caplog):
    request = lm.request("Once upon a time", max_new_tokens=200, ignore_eos=True)
    submit = service.worker.submit

    def broken(job):
        if job.id == "bad":
            raise ZeroDivisionError
        submit(job)

    monkeypatch.setattr(service.worker, "submit", broken)

    async def both():
        good = await service.stream(Job("good", request))
        with pytest.raises(ZeroDivisionError):
            await service.stream(Job("bad", request))
        return [token async for event in good for token in event.tokens]

    assert asyncio.run(asyncio.wait_for(both(), 20)) == alone(lm, request)
    assert service.failures == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(lm, monkeypatch, caplog):
    service = Service(Worker(lm))
    request = lm.request("Once upon a time", max_new_tokens=200, ignore_eos=True)

    def broken(*anything):
        raise ZeroDivisionError

    close = service.worker.close
    monkeypatch.setattr(service.worker, "step", broken)
    monkeypatch.setattr(service.worker, "close", broken)
    service.start()

    async def one():
        first = [event.finish async for event in await service.stream(Job("a", request))]
        with pytest.raises(BusyError, match="shutting down"):
            await service.stream(Job("b", request))
        return first

    assert asyncio.run(asyncio.wait_for(one(), 20)) == ["error"]
    assert not service.ready
    service.stop()
    close()


def test_what_was_never_started_can_be_stopped(lm):
    service = Service(Worker(lm))
    service.stop()
    with pytest.raises(BusyError, match="shutting down"):
        asyncio.run(service.stream(Job("a", lm.request("Once", max_new_tokens=2))))


def test_streams_that_come_while_the_service_stops_are_all_answered(lm):
    request = lm.request("Once", max_new_tokens=3)

    async def storm(service):
        async def one(number):
            try:
                stream = await service.stream(Job(str(number), request))
            except BusyError:
                return "busy"
            return [event.finish async for event in stream][-1]

        stopping = asyncio.to_thread(service.stop)
        found = await asyncio.gather(*map(one, range(40)), stopping, *map(one, range(40, 80)))
        return found[:40] + found[41:]

    for _ in range(5):
        service = Service(Worker(lm))
        service.start()
        ends = asyncio.run(asyncio.wait_for(storm(service), 20))
        assert len(ends) == 80
        assert set(ends) <= {"busy", "length", "stop", "cancelled"}


def test_who_reads_slowly_gets_larger_pieces_and_no_less():
    of_passes = {"path", "sources"}
    lists = {field.name for field in fields(JobEvent) if str(field.type).startswith("list")}
    of_tokens = lists - of_passes

    async def read():
        box = Mailbox()
        for n in range(1000):
            box.put(JobEvent("a", text=f"{n} ", **{name: [n] for name in of_tokens}))
        box.put(JobEvent("a", finish="stop"))
        found = [await box.get()]
        while found[-1].finish is None:
            found.append(await box.get())
        return found

    events = asyncio.run(read())
    assert len(events) < 100
    assert "".join(event.text for event in events) == "".join(f"{n} " for n in range(1000))
    assert of_tokens >= {"tokens", "origins", "logprobs"}
    for name in of_tokens:
        assert [each for event in events for each in getattr(event, name)] == list(range(1000))
    assert events[-1].finish == "stop"
