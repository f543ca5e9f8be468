"""`paceline serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options
from paceline.cli.output import say
from paceline.cli.replicas import model_paths, serve_replicas
from paceline.errors import MethodError, RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(
    model: options.ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called.")] = None,
    drafter: options.Drafter = "blend",
    budget: options.Budget = "auto",
    engine: options.Engine = "auto",
    weight_format: options.Format = "auto",
    kv_format: options.KvFormat = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    places: Annotated[int, typer.Option(min=1, help="Most requests that run at once.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Most requests that wait.")] = 256,
    stall: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="A pass with parts of prompts may take so many times as long as without.",
        ),
    ] = 2.0,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds for those under way when the server stops.")
    ] = 30.0,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines on a Ray cluster, behind this address.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of the Ray cluster; one is started here if left out."),
    ] = None,
) -> None:
    """Serve a model to many users at once."""
    try:
        import uvicorn

        from paceline.serving.api import create_app
    except ImportError as error:
        raise MethodError(f"serving needs {error.name}; pip install 'paceline[serve]'") from None
    from paceline.serving.service import Service
    from paceline.serving.worker import Worker

    if ray is not None and replicas is None:
        raise RequestError("--ray is a cluster to run replicas on; give their number: --replicas")
    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    nodes = options.one_budget(budget)
    paths = model_paths(model)
    called = name or paths[0].name
    where = str(paths[0].resolve()) if len(paths) == 1 else model

    def build(threads: int | None) -> FastAPI:
        lm = replace(chosen, threads=threads).open(where, drafter, nodes)
        return create_app(Service(Worker(lm, places, queue, stall)), called)

    app = build(threads) if replicas is None else None
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise RequestError(f"cannot listen on {host}:{port}: {error}") from None
        if app is None:
            serve_replicas(build, listener, ray, replicas or 1, threads, places + queue, drain)
            return
        say(f"serving {called} on http://{host}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=int(drain), lifespan="on"
        )
        uvicorn.Server(config).run([listener])
