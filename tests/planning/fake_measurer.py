"""A planner without engines: every measurement is a row of a table, and no time passes."""

from paceline.engines.native import KV_FORMATS
from paceline.errors import MethodError
from paceline.measuring.statistics import Ratio
from paceline.planning.busy_watch import BusyWatch
from paceline.planning.known_facts import SourceFacts
from paceline.planning.lab import Lab
from paceline.planning.measured_facts import DraftFacts, EngineFacts, PromptFacts, ReadFacts
from paceline.planning.measurement_store import MeasurementStore
from paceline.planning.plan_search import PlanSearch
from paceline.planning.planner import Planner
from paceline.planning.setups import Goal
from paceline.planning.verification import TurnTime, Verification

MODEL = "folder/model"
# 10 KB a position; formats of fewer bits all take the same here.
PAGES = {**dict.fromkeys(KV_FORMATS, 100_000), "fp32": 640_000, "fp16": 320_000, "int8": 180_000}
BYTES = {"auto": 200_000_000, "int8": 106_000_000, "int4": 56_000_000}
NATS = {"auto": 0.0, "int8": 0.001, "int4": 0.05}
GAINS = {"plain": 1.0, "blend": 1.8, "token_recycling": 1.5}


class FakeMeasurer:
    """Speed is bytes over 10 GB/s; a full tree takes twice as long as a plain pass."""

    prompts = PromptFacts(100.0, 50)

    def __init__(self, nats=None):
        self.calls, self.speed, self.disk, self.warm = [], 0.01, 0.0, ""
        self.losses = {**NATS, **(nats or {})}

    def fingerprint(self, path):
        return f"print of {path}"

    def check_tokens(self, path):
        pass

    def warm_start(self):
        return self.warm

    def bandwidth(self):
        self.calls.append("bandwidth")
        return 1e10

    def reference(self):
        return self.speed

    def engine(self, path, weight_format, threads, weights_memory=None):
        self.calls.append(f"engine {path} {weight_format} {threads}")
        if weights_memory is not None:
            return self.streamed(weights_memory)
        if weight_format not in BYTES:
            raise MethodError(f"no format {weight_format}")
        size = BYTES[weight_format] if path == MODEL else 30_000_000
        once = size / 1e10 * (1.5 if threads == 1 else 1.0)
        return EngineFacts(
            weight_format, size, (1, 16, 64), (once, 2 * once, 8 * once), 1e-6, 1e-3, 2, PAGES, 1000
        ).document()

    def streamed(self, weights_memory):
        if weights_memory < 20_000_000:
            raise MethodError("two layers take 20 MB")
        self.calls.append(f"streamed {weights_memory}")
        return EngineFacts(
            *("auto", weights_memory, (1, 128), (0.1, 0.12), 0.0, 1e-3, 2, PAGES, 1000),
            streamed=BYTES["auto"] - weights_memory,
        ).document()

    def streamed_pass(self, weights_memory):
        return self.disk

    def reads(self, attention, cached):
        self.calls.append(f"reads {attention} {cached}")
        return ReadFacts(float(attention.rpartition("=")[2]), 10).document()

    def nats(self, path, weight_format, cache, window):
        self.calls.append(f"nats {path} {weight_format} {' '.join(map(str, cache))} {window}")
        if weight_format not in self.losses:
            raise MethodError(f"no format {weight_format}")
        lost = self.losses[weight_format] if path == MODEL else 0.31
        lost += {"auto": 0.0, "fp16": 0.0001, "int8": 0.002}.get(cache.kv_format, 0.09)
        lost += 0.5 if cache.policy else 0.0
        lost += 0.01 if cache.attention else 0.0
        return [3.0 + lost, 4.0 + lost]

    def drafts(self, drafter, nodes=16):
        self.calls.append(f"drafts {drafter}" + (f" {nodes}" if nodes != 16 else ""))
        if drafter not in GAINS:
            raise MethodError(f"no drafter {drafter}")
        gain = GAINS[drafter] - 1
        return DraftFacts(
            tuple(1 + gain * n / 16 for n in range(nodes + 1)), 1e-4, state_bytes=1000
        ).document()

    def scores(self, path, weight_format, cache):
        self.calls.append(f"scores {path} {weight_format} {' '.join(map(str, cache))}")
        if weight_format not in self.losses:
            raise MethodError(f"no format {weight_format}")
        return [1.0, 0.5 - 10 * self.losses[weight_format]]


class FakeRunner:
    """Runs as fast as the forecast says, times a factor by title of the setup."""

    turns = 3

    def __init__(self, setup, speed):
        self.setup, self.speed, self.rounds, self.closed = setup, speed, 0, False

    def begin_round(self):
        self.rounds += 1

    def run(self, turn):
        return TurnTime(50, 50 / self.speed, 0.01)

    def close(self):
        self.closed = True


def idle_watch(**options):
    """A watch on a machine that is never busy."""
    still = {"probe": lambda: 1e-3, "waited": lambda: 0.0, "clock": lambda: 0.0}
    still["others"] = lambda: float("inf")  # unknown
    return BusyWatch(**{**still, "pause": lambda seconds: None, **options})


def a_source(**options):
    return SourceFacts(
        **{
            "path": MODEL,
            "name": "model",
            "stored_bytes": BYTES["auto"],
            "parameters": 100_000_000,
            "page_bytes": PAGES,
            "vocab_size": 1000,
            "context": 8192,
            "usable_cores": 2,
            "threads": 2,
            **options,
        }
    )


def a_search(folder, measurer=None, deadline=1.0, clock=lambda: 0.0, judged=False, **options):
    measurer = measurer or FakeMeasurer()
    goal = options.pop("goal", Goal())
    store = MeasurementStore("print", folder)
    lab = Lab(MODEL, store, measurer, idle_watch(), deadline, (), judged, clock=clock)
    prompts = options.pop("prompts", measurer.prompts)
    return PlanSearch(goal, a_source(), lab, prompts, **options)


def a_planner(search, factors=None, verify=True):
    """A planner whose setups run at `factors[format]` times what was said of them."""
    runners = []

    def opened(setup):
        speeds = {"auto": 90.0, "int8": 150.0, "int4": 250.0}
        speed = speeds.get(setup.format, 50.0) * (factors or {}).get(setup.format, 1.0)
        if setup.weights_memory is not None:
            speed = 10.0 * (1 + setup.budget / 128)
        runners.append(FakeRunner(setup, speed))
        return runners[-1]

    verification = Verification(opened, idle_watch(), 1.0, clock=lambda: 0.0) if verify else None
    planner = Planner(search, verification, search.lab.measurer.fingerprint)
    planner.runners = runners
    return planner


def near(ratio, value):
    return isinstance(ratio, Ratio) and abs(ratio.value - value) < 1e-6 * value
