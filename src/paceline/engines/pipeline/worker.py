"""A node: loads some layers, connects to the pipeline, and runs its passes until that ends.

`python -m paceline.engines.pipeline.worker` reads what it is told as JSON from its input.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Event, Thread
from typing import Any, TypeVar

from paceline import __version__
from paceline.engines.base import Engine
from paceline.engines.factory import open_engine
from paceline.engines.part import Part
from paceline.engines.pipeline.stage import StageEntry, StageRunner
from paceline.engines.pipeline.wire import Link, WireError
from paceline.errors import ModelError, PacelineError, one_line
from paceline.models import Model, load
from paceline.models.extension import extend_context

_CONNECT_SECONDS = 30.0
_BEATS = 6  # signs of life in the silence that is allowed
Loaded = TypeVar("Loaded")


def run_node(told: Mapping[str, Any]) -> None:
    """Connect to a pipeline, load the layers, and serve until the connection ends.

    Args:
        told: see `StageSettings.describe`.
    """
    connected(told, _load_and_serve)


def connected(
    told: Mapping[str, Any], load_and_serve: Callable[[Link, Mapping[str, Any]], None]
) -> None:
    """Connect to whoever started this node, give signs of life, and serve until that ends.

    Args:
        told: has `host`, `port`, `token`, `index`, `hop_seconds` and `silence`.
        load_and_serve: is given the connection and `told`.
    """
    address = (str(told["host"]), int(told["port"]))
    link = Link(socket.create_connection(address, _CONNECT_SECONDS), float(told["hop_seconds"]))
    link.limit(None)
    stopped = Event()
    try:
        link.send({"kind": "hello", "token": told["token"], "index": told["index"]})
        interval = float(told["silence"]) / _BEATS
        beats = Thread(target=_beat, args=(link, stopped, interval), daemon=True)
        beats.start()
        load_and_serve(link, told)
    except WireError:
        pass  # the pipeline has ended, or has given this node up
    finally:
        stopped.set()
        link.close()


def _load_and_serve(link: Link, told: Mapping[str, Any]) -> None:
    def load_part() -> tuple[Engine, dict[str, Any]]:
        model = open_checkpoint(told["model"], told["rope"])
        engine = open_part(model, told)
        return engine, facts_of(model, engine)

    engine = report_loading(link, told["model"], load_part)
    if engine is not None:
        serve(link, StageRunner(engine))


def report_loading(
    link: Link, source: str | None, load: Callable[[], tuple[Loaded, dict[str, Any]]]
) -> Loaded | None:
    """Load what a node runs, and report what it is, or why it cannot be loaded; None then."""
    try:
        loaded, facts = load()
    except PacelineError as error:
        link.send(failure(error))
        return None
    except (OSError, MemoryError) as error:
        message = f"cannot load {source}: {one_line(error) or 'out of memory'}"
        link.send(failure(ModelError(message)))
        return None
    link.send({"kind": "ready", "facts": facts})
    return loaded


def open_checkpoint(source: str | None, rope: str | None) -> Model:
    """Return a checkpoint, its context extended.

    Raises:
        PacelineError: it cannot be used.
    """
    model = load(source)
    if rope is None:
        return model
    return replace(model, config=extend_context(model.config, rope))


def open_part(model: Model, told: Mapping[str, Any]) -> Engine:
    """Open the engine of a node, which holds all layers where it is told no part.

    Raises:
        PacelineError: this machine cannot.
    """
    isa = told["facts"].get(INSTRUCTIONS)
    if isa:
        os.environ["PACELINE_ISA"] = isa  # that of the pipeline: others round in other ways
    part = told.get("part")
    return open_engine(
        model,
        told["engine"],
        threads=told["threads"],
        device=told["device"],
        weight_format=told["weight_format"],
        kv_format=told["kv_format"],
        weights_memory=told["weights_memory"],
        part=None if part is None else Part(**part),
    )


INSTRUCTIONS = "instruction set"


def facts_of(model: Model, engine: Engine) -> dict[str, Any]:
    """Return what must be alike on every node for the same tokens; reads every file whole.

    Raises:
        ModelError: a file cannot be read.
    """
    return {
        "files": model.digest(),
        "version": __version__,
        "engine": engine.name,
        INSTRUCTIONS: getattr(engine, "isa", ""),
    }


def serve(link: Link, runner: StageRunner) -> None:
    """Carry out what the pipeline sends, in order, until it ends.

    A change of caches that fails ends the node: what it holds is not what the pipeline thinks.

    Raises:
        WireError: the connection has ended.
        PacelineError: a change failed.
    """
    while True:
        head, arrays = link.receive()
        if head["kind"] == "change":
            runner.change(head["operation"], head["key"], *arrays[0].tolist())
            continue
        keys = head["keys"]
        trees = zip(keys, arrays[::2], arrays[1::2], strict=False)
        entries = [StageEntry(key, tokens, parents) for key, tokens, parents in trees]
        states = arrays[2 * len(keys)] if len(arrays) > 2 * len(keys) else None
        try:
            made = runner.run(entries, states, head["answer"])
        except (PacelineError, MemoryError) as error:
            link.send(failure(error))
        else:
            link.send({"kind": "done"}, [made])


def failure(error: Exception) -> dict[str, Any]:
    """Return a frame's head that reports an error."""
    message = one_line(error) or "out of memory"
    return {"kind": "failed", "error": type(error).__name__, "message": message}


def _beat(link: Link, stopped: Event, interval: float) -> None:
    """Give signs of life."""
    while not stopped.wait(interval):
        try:
            link.send({"kind": "alive"})
        except WireError:
            return


def main(run: Callable[[Mapping[str, Any]], None] = run_node) -> None:
    """Run the node that the input describes."""
    told = json.load(sys.stdin)
    try:
        run(told)
    except (OSError, PacelineError) as error:
        sys.exit(f"node {told['index'] + 1}: {one_line(error)}")


if __name__ == "__main__":
    main()
