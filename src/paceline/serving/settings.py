"""The settings of `paceline serve`: flags override the environment, which overrides the file."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from paceline import registry
from paceline.byte_sizes import Size
from paceline.errors import RequestError, unknown
from paceline.method_spec import split_quoted
from paceline.models.nested import parse_memory

PREFIX = "PACELINE_SERVE_"
# Earlier names of settings, understood for one release.
EARLIER_NAMES = {
    "places": "max_running",
    "stall": "prefill_slowdown",
    "prefixes": "prefix_cache",
}
_HIDDEN = ("keys", "watermark")  # never shown
_BODY = Size(10**6)
_PREFIX_CACHE = Size(4 * 10**9)


@dataclass(frozen=True)
class SettingInfo:
    """Describes a setting.

    Attributes:
        text: its help.
        min: smallest number allowed.
        max: largest number allowed.
        separator: between the texts of a list.
    """

    text: str
    min: float | None = None
    max: float | None = None
    separator: str = ","


@dataclass(frozen=True)
class ServerSettings:
    """Every field is a flag, an environment variable and a key of the settings file."""

    model: Annotated[
        str | None, SettingInfo("Name, folder, GGUF file or hub id. Default: the embedded model.")
    ] = None
    name: Annotated[
        str | None, SettingInfo("Name of the model in the API. Default: the last part of its path.")
    ] = None
    host: Annotated[str, SettingInfo("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, SettingInfo("Port to listen on; 0 picks a free one.", 0, 65535)] = 8000
    drafter: Annotated[
        str, SettingInfo("Drafting method, NAME[:key=value,...]; see `paceline methods`.")
    ] = "blend"
    budget: Annotated[
        str, SettingInfo("Maximum nodes of a tree beyond its root; auto: chosen by cost.")
    ] = "auto"
    plan: Annotated[
        str | None,
        SettingInfo(
            "File of `paceline plan`, for settings that are not given; auto: measure while idle, "
            "and switch drafter, budget and threads, which change no answer."
        ),
    ] = None
    known_plan: Annotated[
        bool,
        SettingInfo(
            "With a model and no settings of how to run it, use the plan that was made of it on "
            "this machine."
        ),
    ] = True
    warm: Annotated[
        bool,
        SettingInfo(
            "While a server without replicas is idle, let a chat model answer a mix of prompts "
            "until drafters have the warm start that `paceline warm` makes, which is kept."
        ),
    ] = True
    engine: Annotated[str, SettingInfo("Engine: auto, native or reference.")] = "auto"
    format: Annotated[str, SettingInfo("Weight format, as in `paceline generate`.")] = "auto"
    kv_format: Annotated[
        str,
        SettingInfo(
            "Format of cached keys and values: fp32, fp16, int8, int4, int3, gear; auto: fp32."
        ),
    ] = "auto"
    attention: Annotated[
        str | None, SettingInfo("Attention pattern of every answer, as in `paceline generate`.")
    ] = None
    rope: Annotated[
        str | None,
        SettingInfo("Extend the context: yarn:factor=2, linear:factor=2 or dynamic:factor=2."),
    ] = None
    device: Annotated[str | None, SettingInfo("Device of the torch engines, e.g. cuda.")] = None
    threads: Annotated[
        int | None, SettingInfo("Threads of the native engine. Default: all usable cores.", 1, 1024)
    ] = None
    max_running: Annotated[int, SettingInfo("Maximum number of running requests.", 1, 4096)] = 32
    queue: Annotated[
        int, SettingInfo("Maximum number of queued requests; further ones get status 429.", 0)
    ] = 256
    prefill_slowdown: Annotated[
        float,
        SettingInfo(
            "A pass that prefills may take this many times as long as one that only decodes.", 1
        ),
    ] = 2.0
    memory: Annotated[
        Size | None,
        SettingInfo(
            "Memory limit of the process, weights and KV caches included, e.g. 2GB. Default: keys "
            "and values for the longest texts of all running requests, at most a quarter of the "
            "memory that is free at the start.",
            1,
        ),
    ] = None
    weight_memory: Annotated[
        str | None,
        SettingInfo(
            "Load as many blocks of a nested checkpoint (recipe bitstack, any_precision or "
            "llm_qfa) as fit, e.g. 80MB, or as many bits of each code, e.g. 4bits."
        ),
    ] = None
    weights_memory: Annotated[
        Size | None,
        SettingInfo(
            "Keep at most so many bytes of weights in memory, e.g. 600MB, and stream other layers "
            "from disk in each pass. Default: all weights are in memory.",
            1,
        ),
    ] = None
    prefix_cache: Annotated[
        float,
        SettingInfo("Share of the KV memory that finished requests' prefixes may fill.", 0, 1),
    ] = 0.5
    prefix_cache_dir: Annotated[
        Path | None,
        SettingInfo("Folder that keeps the keys and values of prompts for the next start."),
    ] = None
    prefix_cache_bytes: Annotated[
        Size, SettingInfo("Maximum size of that folder; the least recently used go first.", 1)
    ] = _PREFIX_CACHE
    chunk_cache: Annotated[
        Path | None,
        SettingInfo("Folder that keeps the keys and values of documents for the next start."),
    ] = None
    chunk_cache_bytes: Annotated[
        Size, SettingInfo("Maximum size of that folder; the least recently used go first.", 1)
    ] = _PREFIX_CACHE
    chunk_memory: Annotated[
        Size | None,
        SettingInfo(
            "Maximum size of the documents' keys and values in memory, a part of --memory. "
            "Default: 256MiB, and nothing where --memory is given.",
            0,
        ),
    ] = None
    watermark: Annotated[
        str | None,
        SettingInfo("Watermark of every answer: key=SECRET, and more as in `paceline generate`."),
    ] = field(default=None, repr=False)
    watermark_choice: Annotated[
        bool, SettingInfo("Let requests bring a watermark of their own, or turn it off.")
    ] = False
    kv_policy: Annotated[
        str | None,
        SettingInfo("Policy that bounds the cache of each request, as in `paceline generate`."),
    ] = None
    kv_policy_choice: Annotated[
        bool, SettingInfo("Let requests bring a KV policy of their own, or turn it off.")
    ] = False
    guides: Annotated[
        tuple[str, ...],
        SettingInfo(
            "Guides that requests may name: NAME=GUIDE, separated by semicolons.", separator=";"
        ),
    ] = ()
    max_tokens: Annotated[int | None, SettingInfo("Maximum tokens of an answer.", 1)] = None
    default_tokens: Annotated[
        int | None,
        SettingInfo(
            "Tokens of an answer if the body gives no number. Default: the rest of the context.", 1
        ),
    ] = None
    max_prompt: Annotated[int | None, SettingInfo("Maximum tokens of a prompt.", 1)] = None
    max_answers: Annotated[
        int, SettingInfo("Maximum answers to one request, over all its prompts.", 1)
    ] = 128
    max_body: Annotated[Size, SettingInfo("Maximum size of a body.", 1)] = _BODY
    max_connections: Annotated[int, SettingInfo("Maximum open connections.", 1)] = 1024
    head_seconds: Annotated[
        float, SettingInfo("Seconds for the head of a request to arrive.", 0.01)
    ] = 10.0
    body_seconds: Annotated[float, SettingInfo("Seconds for its body to arrive.", 0.01)] = 30.0
    write_seconds: Annotated[
        float, SettingInfo("Seconds for a client to read a piece of its stream.", 0.01)
    ] = 60.0
    idle_seconds: Annotated[
        float, SettingInfo("Seconds until an idle connection is closed.", 0.01)
    ] = 15.0
    drain: Annotated[float, SettingInfo("Seconds to finish running requests at shutdown.", 0)] = (
        30.0
    )
    replicas: Annotated[
        int | None, SettingInfo("Engines on a Ray cluster, all behind this address.", 1, 4096)
    ] = None
    pipeline: Annotated[
        int | None,
        SettingInfo(
            "Nodes that share the layers of the model, this process included: the others lie on a "
            "Ray cluster (--ray), or are processes here.",
            2,
            64,
        ),
    ] = None
    prefill_replicas: Annotated[
        int | None,
        SettingInfo(
            "Further processes that read long prompts and hand over their keys and values, so that "
            "running streams do not wait: on a Ray cluster (--ray), or here.",
            1,
            64,
        ),
    ] = None
    prefill_threshold: Annotated[
        int, SettingInfo("Tokens that a prompt must lack to be read by one of them.", 1)
    ] = 256
    ray: Annotated[
        str | None,
        SettingInfo(
            "Address of the Ray cluster of replicas, a pipeline or prefill replicas. Default: "
            "replicas start one here."
        ),
    ] = None
    keys: Annotated[
        tuple[str, ...],
        SettingInfo("API keys, NAME:KEY, separated by commas. In the environment only."),
    ] = field(default=(), repr=False)
    keys_file: Annotated[Path | None, SettingInfo("File of API keys, NAME:KEY in each line.")] = (
        None
    )
    request_rate: Annotated[
        float | None,
        SettingInfo(
            "Requests per minute of each key, or of each address if there are no keys.", 0.001
        ),
    ] = None
    token_rate: Annotated[
        float | None, SettingInfo("Tokens per minute, read or written, likewise.", 0.001)
    ] = None
    cors: Annotated[
        tuple[str, ...], SettingInfo("Origins whose pages may use the API; *: any.")
    ] = ()
    unknown_fields: Annotated[
        str,
        SettingInfo("Unknown fields of a body: refuse them, or ignore them and warn in a header."),
    ] = "refuse"
    log_prompts: Annotated[bool, SettingInfo("Write prompts and answers to the log.")] = False
    log_format: Annotated[
        str, SettingInfo("Lines of the log: text, json, or auto: text on a terminal, else JSON.")
    ] = "auto"
    ssl_certfile: Annotated[
        Path | None,
        SettingInfo("PEM file with the certificate chain; the server then speaks HTTPS only."),
    ] = None
    ssl_keyfile: Annotated[
        Path | None,
        SettingInfo("PEM file with the certificate's key, unless the certificate's file has it."),
    ] = None

    def __post_init__(self) -> None:
        for name, (kind, info) in _described().items():
            _check(name, kind, info, getattr(self, name))
        if self.unknown_fields not in ("refuse", "warn"):
            raise RequestError(
                f"unknown_fields is {self.unknown_fields!r:.40}, expected refuse or warn"
            )
        if self.log_format not in ("auto", "text", "json"):
            raise RequestError(
                f"log_format is {self.log_format!r:.40}, expected auto, text or json"
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise RequestError("ssl_keyfile needs its certificate; name it in ssl_certfile")
        if self.plan is not None and self.replicas is not None:
            raise RequestError(
                "a plan is of one machine, and replicas run on several; leave out plan or replicas"
            )
        if self.pipeline is not None and (self.replicas is not None or self.plan is not None):
            other = "plan" if self.replicas is None else "replicas"
            raise RequestError(
                f"pipeline divides one model among nodes, which {other} does not know; leave out "
                f"pipeline or {other}"
            )
        if self.prefill_replicas is not None and self.replicas is not None:
            raise RequestError(
                "replicas are whole servers, each of which reads its prompts itself; leave out "
                "prefill_replicas or replicas"
            )
        if self.weight_memory is not None:
            parse_memory("weight_memory", self.weight_memory)
        if self.watermark is not None:
            _operator_policy().parse_watermark(self.watermark)
        if self.attention is not None:
            registry.patterns.parse(self.attention)
        if self.kv_policy is not None:
            _operator_policy().parse_policy(self.kv_policy)
        if self.guides:
            _operator_policy().parse_guides(self.guides)

    @classmethod
    def read(
        cls, flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
    ) -> ServerSettings:
        """Combine the settings of flags, environment and file.

        Args:
            flags: by name of the setting; None is not given.
            environ: the environment; variables begin with `PREFIX`.
            file: TOML, or JSON if it ends in `.json`.

        Raises:
            RequestError: a name is unknown, or a value is malformed or out of range.
        """
        given = given_settings(flags, environ, file)
        described = _described()
        return cls(**{name: _read(name, *described[name], value) for name, value in given.items()})

    def shown(self) -> dict[str, Any]:
        """Return the settings for JSON; of keys only the names, of the watermark not the key."""
        shown: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            shown[each.name] = str(value) if isinstance(value, Path | Size) else value
        if self.watermark is not None:
            operator_policy = _operator_policy()
            shown["watermark"] = operator_policy.shown(
                operator_policy.parse_watermark(self.watermark)
            )
        return shown | {"keys": [key.partition(":")[0] for key in self.keys]}


def given_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> dict[str, Any]:
    """Return the settings that flags, environment or file give, as they are written there.

    Arguments and errors are those of `ServerSettings.read`.
    """
    given = _from_file(file) if file else {}
    given |= _from_environment(environ)
    return given | {name: value for name, value in flags.items() if value is not None}


def names(secret: bool = False) -> list[str]:
    """Return the names of all settings; the secret ones only if `secret`."""
    return [each.name for each in fields(ServerSettings) if secret or each.name != "keys"]


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def kind_of(name: str) -> Any:
    """Return the type of a setting, without None."""
    return _plain(_described()[name][0])


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield name, default and help of each setting."""
    defaults = ServerSettings()
    for name, (_, info) in _described().items():
        default = getattr(defaults, name)
        yield name, "" if default in (None, ()) else str(default), info.text


@cache
def _described() -> dict[str, tuple[Any, SettingInfo]]:
    """Return the type and the description of each setting."""
    hints = get_type_hints(ServerSettings, include_extras=True)
    return {each.name: get_args(hints[each.name])[:2] for each in fields(ServerSettings)}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise RequestError(f"cannot read the settings in {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{path} is not valid {path.suffix[1:] or 'toml'}: {error!s:.100}"
        ) from None
    if not isinstance(found, dict):
        raise RequestError(f"{path} is not a table of settings; write NAME = VALUE lines")
    if "keys" in found:
        raise RequestError(
            f"{path} has keys; put them into a separate file and name it in keys_file"
        )
    for name in found:
        new = EARLIER_NAMES.get(name)
        if new in found:
            raise RequestError(f"{path} gives {name} and {new}, which are one setting; keep {new}")
    found = {EARLIER_NAMES.get(name, name): value for name, value in found.items()}
    for name in found:
        if name not in names():
            raise RequestError(f"{path}: {unknown('setting', name, names())}")
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    given = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in EARLIER_NAMES:
            name = EARLIER_NAMES[name]
            if PREFIX + name.upper() in environ:
                raise RequestError(
                    f"{variable} and {PREFIX}{name.upper()} are one setting; keep the second"
                )
        if name not in names(secret=True):
            known = [PREFIX + each.upper() for each in names(secret=True)]
            raise RequestError(unknown("variable", variable, known))
        given[name] = value
    return given


def _operator_policy() -> ModuleType:
    """Import the module only where it is needed: it imports much."""
    from paceline.serving import operator_policy

    return operator_policy


def _plain(kind: Any) -> Any:
    """Return a type without None."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    return parts[0] if parts and get_origin(kind) is not tuple else kind


def _read(name: str, kind: Any, info: SettingInfo, value: Any) -> Any:
    """Convert a value of the file, or the text of a flag or variable, to the setting's type."""
    plain = _plain(kind)
    try:
        if get_origin(plain) is tuple:
            if isinstance(value, str):
                value = split_quoted(value, info.separator) if value.strip() else ()
            parts = tuple(str(part).strip() for part in value)
            if "" in parts:
                raise RequestError(f"{name} has an empty member; leave it out")
            return parts
        if plain is Size:
            return Size(value) if type(value) is int else Size.parse(str(value))
        if isinstance(value, str) and plain is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(value, str) and plain in (int, float, Path):
            return plain(value)
        return float(value) if plain is float and type(value) is int else value
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        said = error if isinstance(error, ValueError) and plain is Size else _expected(plain)
        raise RequestError(f"{name} is {_shown(name, value)}: {said}") from None


def _check(name: str, kind: Any, info: SettingInfo, value: Any) -> None:
    """Refuse a value of another type or out of range."""
    plain, minimum, maximum = _plain(kind), info.min, info.max
    if value is None and type(None) in get_args(kind):
        return
    expected = tuple if get_origin(plain) is tuple else plain
    if not isinstance(value, expected) or (isinstance(value, bool) and plain is not bool):
        raise RequestError(f"{name} is {_shown(name, value)}: {_expected(plain)}")
    if minimum is None:
        return
    number = float(value)  # type: ignore[arg-type]
    if not minimum <= number <= (maximum or sys.float_info.max):
        span = f"{minimum:g} to {maximum:g}" if maximum is not None else f"{minimum:g} or more"
        raise RequestError(f"{name} is {value}, expected {span}")


def _shown(name: str, value: object) -> str:
    return "something else" if name in _HIDDEN else repr(value)[:100]


def _expected(kind: Any) -> str:
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return f"expected {what.get(kind, 'a path' if kind is Path else 'a list of strings')}"
