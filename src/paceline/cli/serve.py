"""`paceline serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import say
from paceline.errors import MethodError, RequestError


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
) -> None:
    """Serve a model to many users at once."""
    try:
        import uvicorn

        from paceline.serving.api import create_app
    except ImportError as error:
        raise MethodError(f"serving needs {error.name}; pip install 'paceline[serve]'") from None
    from paceline.serving.service import Service
    from paceline.serving.worker import Worker

    chosen = options.EngineChoice(engine, device, threads, weight_format, kv_format)
    lm = chosen.open(model, drafter, options.one_budget(budget))
    worker = Worker(lm, places, queue, stall)
    app = create_app(Service(worker), name or lm.model.path.name)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise RequestError(f"cannot listen on {host}:{port}: {error}") from None
        say(f"serving {name or lm.model.path.name} on http://{host}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=int(drain), lifespan="on"
        )
        uvicorn.Server(config).run([listener])
