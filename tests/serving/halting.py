"""Makes the order of events explicit: a worker that stops working at a point the test names."""

import time


def halt(monkeypatch, worker, tokens=1, until=lambda: False):
    """After `tokens` more tokens run no pass before `until()`: requests end only if cancelled."""
    step, end = worker.step, worker.stats.tokens + tokens

    def halted():
        if worker.stats.tokens < end or until():
            return step()
        time.sleep(0.001)
        return []

    monkeypatch.setattr(worker, "step", halted)
