"""`paceline serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import inspect
import os
import socket
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.byte_sizes import Size
from paceline.cli import options
from paceline.cli.output import document, say
from paceline.cli.pipeline import pipeline_of
from paceline.cli.plan_settings import AUTO, planned_settings, tune_while_idle
from paceline.cli.prefill import prefill_of, shared_threads
from paceline.cli.replicas import model_paths, scheme, serve_replicas
from paceline.compatibility import Side, check
from paceline.errors import MethodError, RequestError
from paceline.serving import settings as known
from paceline.serving.settings import ServerSettings

if TYPE_CHECKING:
    from ssl import SSLContext

    from fastapi import FastAPI

    from paceline.engines.pipeline.settings import Pipeline
    from paceline.lm import LM
    from paceline.serving.api.middleware import Rules
    from paceline.serving.api_keys import ApiKeys
    from paceline.serving.operator_policy import OperatorPolicy
    from paceline.serving.prefill.pool import PrefillPool
    from paceline.serving.rate_limits import RateLimits
    from paceline.serving.service import Service
    from paceline.serving.worker import Worker


def serve(config: Path | None = None, show_config: bool = False, **flags: Any) -> None:
    """Serve a model to many users at once."""
    settings = ServerSettings.read(flags, os.environ, config)
    given = set(known.given_settings(flags, os.environ, config))
    settings = planned_settings(settings, given)
    if show_config:
        document(settings.shown())
        return
    try:
        import uvicorn  # noqa: F401

        from paceline.serving.api.server import DrainingServer
    except ImportError as error:
        raise MethodError(f"serving needs {error.name}; pip install 'paceline[serve]'") from None
    from paceline.serving.api_keys import ApiKeys
    from paceline.serving.loading_answers import answering
    from paceline.serving.logs import log_to_stderr

    keys = ApiKeys.read(settings.keys, settings.keys_file)
    if settings.replicas is not None:
        _replicated(settings, keys)
        return
    apart = settings.prefill_replicas
    if settings.ray is not None and settings.pipeline is None and apart is None:
        raise RequestError(
            "--ray is a cluster to run replicas or a pipeline on; give their number: --replicas, "
            "--pipeline or --prefill-replicas"
        )
    settings = shared_threads(settings)
    tls = _tls(settings)
    with (
        _listening(settings.host, settings.port) as listener,
        pipeline_of(settings) as pipeline,
        prefill_of(settings) as prefill,
    ):
        with answering(listener, tls):
            lm = _open(settings, pipeline)
            app, service = _app(lm, settings, _rules(settings, keys), prefill(lm))
        if settings.warm:
            _warm_while_idle(service)
        if settings.plan == AUTO:
            tune_while_idle(service, given)
        server = DrainingServer(app, service, settings)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = listener.getsockname()[1]
        say(f"serving {settings.name or lm.model.name} on {scheme(settings)}://{host}:{port}")
        _warn(settings, keys)
        log_to_stderr(settings.log_format)
        server.run([listener])
        if pipeline is not None:
            lm.close()
    if server.force_exit:
        raise typer.Exit(1)


def _warm_while_idle(service: Service) -> None:
    """Let a chat model answer prompts while there are no requests, if its drafters start warm."""
    from paceline.serving.idle_warming import IdleWarming
    from paceline.training.prompt_mix import prompts_of

    lm = service.worker.lm
    learns = getattr(lm.drafter_method, "warm", False) and lm.draft_target.model is not None
    if not learns or lm.tokenizer.template is None:
        return
    task = IdleWarming(service.worker, prompts_of(lm, None, 0))
    if not task.done:
        service.idle_tasks.append(task)
        service.observers.append(task)


def _tls(settings: ServerSettings) -> SSLContext | None:
    """Return the TLS context of the settings; None for a server that speaks HTTP."""
    from paceline.serving.tls import server_context

    if settings.ssl_certfile is None:
        return None
    return server_context(settings.ssl_certfile, settings.ssl_keyfile)


def _open(settings: ServerSettings, pipeline: Pipeline | None = None) -> LM:
    chosen = options.EngineOptions(
        settings.engine,
        settings.device,
        settings.threads,
        settings.format,
        settings.kv_format,
        settings.weight_memory,
        None if settings.weights_memory is None else str(settings.weights_memory),
        attention=settings.attention,
        rope=settings.rope,
    )
    budget = options.one_budget(settings.budget)
    lm = chosen.open(settings.model, settings.drafter, budget, pipeline)
    if settings.prefix_cache_dir is not None:
        lm.store_prefixes(settings.prefix_cache_dir, settings.prefix_cache_bytes)
    from paceline.documents.chunk_cache import DEFAULT_MEMORY

    memory = settings.chunk_memory
    if memory is None:
        memory = Size(DEFAULT_MEMORY if settings.memory is None else 0)
    lm.store_chunks(settings.chunk_cache, settings.chunk_cache_bytes, memory)
    return lm


def _steering(lm: LM, settings: ServerSettings) -> OperatorPolicy:
    """Return the watermark and guides of answers; opens the models of guides."""
    from paceline.kvcache.base import parse_policy
    from paceline.serving.operator_policy import OperatorPolicy, open_guides, parse_guides
    from paceline.watermarks.base import parse_watermark

    mark = None if settings.watermark is None else parse_watermark(settings.watermark)
    guides = parse_guides(settings.guides)
    open_guides(lm, guides)
    policy = None if settings.kv_policy is None else parse_policy(settings.kv_policy)
    if policy is not None or settings.kv_policy_choice:
        (policy or parse_policy("sliding_window")).check(lm.engine)
    if policy is not None and lm.pages is not None:
        own = f"the KV policy {policy.name}"
        check({Side.STORED_PREFIXES: "--prefix-cache-dir", Side.KV_POLICY: own})
    return OperatorPolicy(
        mark, settings.watermark_choice, guides, policy, settings.kv_policy_choice
    )


def _worker(lm: LM, settings: ServerSettings, prefill: PrefillPool | None) -> Worker:
    from paceline.drafters.base import engines_of
    from paceline.serving.kv_budget import DEFAULT_SHARE, room
    from paceline.serving.worker import Worker

    promised, others = settings.memory, [*engines_of(lm.drafter), *lm.guide_models.loaded]
    if promised is not None:  # of which documents take theirs
        promised = Size(max(0, promised - lm.request_builder.chunks.memory))
    memory = None if promised is None else room(promised, lm.engine, others)
    worker = Worker(
        lm,
        settings.max_running,
        settings.queue,
        settings.prefill_slowdown,
        memory,
        settings.prefix_cache,
        prefill,
    )
    if promised is None:
        say(
            f"keys and values take up to {worker.memory.limit.total / 1e6:,.0f} MB, at most "
            f"{DEFAULT_SHARE:.0%} of the memory that was free; see --memory"
        )
    return worker


def _warn(settings: ServerSettings, keys: ApiKeys) -> None:
    if not keys and not _loopback(settings.host):
        say(f"whoever reaches {settings.host} may use it: there are no API keys")


def _replicated(settings: ServerSettings, keys: ApiKeys) -> None:
    """Serve from a Ray cluster, each replica with these settings; rates hold for the whole."""
    from paceline.models.hub import display_name

    _tls(settings)
    paths = model_paths(settings.model)
    here = str(paths[0].resolve()) if len(paths) == 1 else settings.model
    settings = replace(settings, model=here, name=settings.name or display_name(paths[0]))

    rules = _rules(settings, keys)

    def build(threads: int, rates: RateLimits) -> FastAPI:
        from paceline.serving.rate_limits import RateLimits

        # The front has measured the body, which may have grown by a seed.
        own = replace(
            settings,
            threads=threads if _has_threads(settings) else settings.threads,
            cors=(),
            max_body=Size(4 * settings.max_body),
        )
        meter = (
            RateLimits() if settings.token_rate is None else rates
        )  # nobody would ask what is owed
        return _app(_open(own), own, replace(_rules(own, keys), rates=meter))[0]

    with _listening(settings.host, settings.port) as listener:
        _warn(settings, keys)
        serve_replicas(build, listener, settings, rules)


def _has_threads(settings: ServerSettings) -> bool:
    """Return whether the engine is the native one, whose threads are counted."""
    torch = settings.device is not None or settings.weight_memory is not None
    return settings.engine in ("auto", "native") and not torch


def _app(
    lm: LM, settings: ServerSettings, rules: Rules, prefill: PrefillPool | None = None
) -> tuple[FastAPI, Service]:
    from paceline.serving import playground
    from paceline.serving.api import create_app
    from paceline.serving.api.parse import RequestLimits
    from paceline.serving.service import Service

    steering = _steering(lm, settings)  # first: what guides hold is part of the memory
    service = Service(_worker(lm, settings, prefill))
    limits = RequestLimits(
        new_tokens=settings.max_tokens,
        prompt_tokens=settings.max_prompt,
        default_tokens=settings.default_tokens,
        answers=settings.max_answers,
        steering=steering,
    )
    name = settings.name or lm.model.name
    pictured = playground.machine_router(_picture)
    app = create_app(service, name, limits, rules, settings.cors, [playground.router, pictured])
    return app, service


def _picture(lm: LM) -> dict[str, Any]:
    from paceline.planning.machine_picture import served_picture

    return served_picture(lm).document()


def _rules(settings: ServerSettings, keys: ApiKeys) -> Rules:
    from paceline.serving.api.middleware import Rules
    from paceline.serving.rate_limits import RateLimits

    return Rules(
        keys=keys,
        rates=RateLimits(settings.request_rate, settings.token_rate),
        max_body=settings.max_body,
        body_seconds=settings.body_seconds,
        write_seconds=settings.write_seconds,
        log_prompts=settings.log_prompts,
        unknown_fields=settings.unknown_fields,
    )


def _listening(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # inherited: finds dead peers
    try:
        listener.bind((host, port))
        listener.listen()  # early connections wait until the server runs
    except (OSError, OverflowError) as error:
        listener.close()
        raise RequestError(f"cannot listen on {host}:{port}: {error}") from None
    return listener


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_PANELS = {
    "Model": (
        "model",
        "name",
        "engine",
        "format",
        "kv_format",
        "attention",
        "device",
        "rope",
        "threads",
        "weight_memory",
        "weights_memory",
    ),
    "Drafting": ("drafter", "budget", "warm"),
    "Plan": ("plan", "known_plan"),
    "Network": (
        "host",
        "port",
        "cors",
        "head_seconds",
        "body_seconds",
        "write_seconds",
        "idle_seconds",
        "max_connections",
        "drain",
    ),
    "Limits": (
        "max_running",
        "queue",
        "prefill_slowdown",
        "memory",
        "prefix_cache",
        "prefix_cache_dir",
        "prefix_cache_bytes",
        "chunk_cache",
        "chunk_cache_bytes",
        "chunk_memory",
        "max_tokens",
        "default_tokens",
        "max_prompt",
        "max_answers",
        "max_body",
        "unknown_fields",
    ),
    "Policy": ("watermark", "watermark_choice", "guides", "kv_policy", "kv_policy_choice"),
    "Security": (
        "keys_file",
        "ssl_certfile",
        "ssl_keyfile",
        "request_rate",
        "token_rate",
        "log_prompts",
        "log_format",
    ),
    "Cluster": ("replicas", "pipeline", "prefill_replicas", "prefill_threshold", "ray"),
}  # of settings in --help; others are in the first panel


def _panel(name: str) -> str | None:
    return next((panel for panel, names in _PANELS.items() if name in names), None)


def _signature() -> inspect.Signature:
    """Return a flag for each setting; values are checked where all sources are joined."""

    def parameter(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
        annotation = Annotated[kind, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, keyword, default=default, annotation=annotation)

    parameters = []
    for name, default, about in known.rows():
        if name not in known.names():
            continue
        flag, kind = known.flag(name), known.kind_of(name)
        if kind is bool:
            option = typer.Option(
                f"{flag}/--no-{flag[2:]}",
                help=about,
                show_default=default,
                rich_help_panel=_panel(name),
            )
            parameters.append(parameter(name, bool | None, option))
        else:
            kinds = {int: "INTEGER", float: "NUMBER", Size: "SIZE", Path: "PATH"}
            metavar = kinds.get(kind, "TEXT")
            option = typer.Option(
                flag,
                help=about,
                metavar=metavar,
                show_default=default or False,
                rich_help_panel=_panel(name),
            )
            parameters.append(parameter(name, str | None, option))
    file = typer.Option("--config", help="A .toml or .json file with settings.")
    shown = typer.Option("--show-config", help="Print what would be used, as JSON, and stop.")
    parameters.append(parameter("config", Path | None, file))
    parameters.append(parameter("show_config", bool, shown, False))
    return inspect.Signature(parameters)


setattr(serve, "__signature__", _signature())  # noqa: B010
serve.__annotations__ = {
    name: parameter.annotation for name, parameter in inspect.signature(serve).parameters.items()
}
