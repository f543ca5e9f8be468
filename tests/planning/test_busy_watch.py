"""A busy machine is noticed, told and measured again; nothing here waits."""

import math
import multiprocessing
import threading

from paceline.planning.busy_watch import BusyWatch, others_seconds, waited_seconds
from paceline.planning.measurement_store import MeasurementStore
from tests.planning.fake_measurer import idle_watch


def run(watch, values):
    left = iter(values)
    return watch.run("it", lambda: next(left), min)


def test_an_idle_machine_measures_once():
    said = []
    assert run(idle_watch(say=said.append), [7, 8]) == 7
    assert said == []


def test_a_slow_probe_repeats_the_measurement():
    said, pauses = [], []
    probes = iter([1, 1, 1, 3, 1, 1])  # the second try is idle again
    watch = idle_watch(probe=lambda: next(probes), say=said.append, pause=pauses.append)
    assert run(watch, [6]) == 6
    assert run(watch, [5, 9]) == 9
    assert watch.repeated == 1
    assert watch.busy == 0
    assert pauses == [2.0]
    assert "3.0 times as slow" in said[0]
    assert "measuring it" in said[0]


def test_threads_that_waited_for_a_core_repeat_it():
    waited, times = iter([0.0, 0.9, 0.9, 0.9]), iter([0.0, 1.0, 2.0, 3.0])
    watch = idle_watch(waited=lambda: next(waited), clock=lambda: next(times))
    assert run(watch, [5, 9]) == 9
    assert watch.repeated == 1


def test_threads_that_waited_for_each_other_repeat_nothing():
    waited, times = iter([0.0, 0.9, 0.9, 1.8]), iter([0.0, 1.0, 2.0, 3.0])
    others = iter([7.0, 7.1, 7.1, 8.0])  # 0.1 s of the first measurement, 0.9 s of the second
    watch = idle_watch(
        waited=lambda: next(waited), others=lambda: next(others), clock=lambda: next(times)
    )
    assert run(watch, [5]) == 5
    watch.hurried = lambda: True
    assert run(watch, [6]) == 6
    assert (watch.repeated, watch.busy) == (0, 1)


def test_what_other_programs_took_is_a_time_or_unknown():
    assert not math.isnan(others_seconds())


def test_the_best_of_three_is_kept_where_it_stays_busy():
    said = []
    watch = BusyWatch(
        probe=lambda: 1.0,
        waited=iter(range(100)).__next__,
        others=lambda: float("inf"),
        clock=lambda: 0.0,
        pause=lambda seconds: None,
        say=said.append,
    )
    assert run(watch, [5, 3, 4]) == 3
    assert (watch.repeated, watch.busy) == (2, 1)
    assert "stayed busy" in said[-1]
    assert run(watch, [5, 3, 4]) == 3
    assert run(watch, [5]) == 5  # later ones are not repeated
    assert watch.busy == 3


def test_without_time_nothing_is_repeated():
    watch = idle_watch(waited=iter(range(100)).__next__, hurried=lambda: True)
    assert run(watch, [5, 3]) == 5
    assert (watch.repeated, watch.busy) == (0, 1)


def test_waiting_is_counted_in_seconds():
    assert waited_seconds() >= 0.0


def parse(found):
    return int(found["value"])


def test_two_plans_share_what_either_measures(tmp_path):
    store, made = MeasurementStore("print", tmp_path), []

    def measure():
        made.append(1)
        return {"value": len(made)}

    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(store.measured("kind", ("key",), parse, measure))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8
    assert len(made) == 1


def hammer(folder, number):
    store = MeasurementStore("print", folder)
    for key in range(20):
        store.measured("kind", (key,), parse, lambda key=key: {"value": key})


def test_processes_leave_whole_files_only(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=hammer, args=(tmp_path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = MeasurementStore("print", tmp_path)
    assert [store.known("kind", (key,), parse) for key in range(20)] == list(range(20))
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = MeasurementStore("print", tmp_path / "file")
    assert store.measured("kind", (), parse, lambda: {"value": 3}) == 3


def test_other_models_and_machines_have_other_measurements(tmp_path, monkeypatch):
    store = MeasurementStore("print", tmp_path)
    store.measured("kind", (), parse, lambda: {"value": 1})
    assert MeasurementStore("other", tmp_path).known("kind", (), parse) is None
    monkeypatch.setattr("paceline.planning.measurement_store.__version__", "99")
    assert MeasurementStore("print", tmp_path).known("kind", (), parse) is None
