"""Everything that `paceline serve` can be told: flags before environment before file."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from paceline.errors import RequestError, unknown

PREFIX = "PACELINE_SERVE_"
# Earlier names of settings, understood for one release.
EARLIER_NAMES = {
    "places": "max_running",
    "stall": "prefill_slowdown",
    "prefixes": "prefix_cache",
}
_HIDDEN = ("keys", "watermark")  # never told
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(int):
    """Bytes, written as `2GB` or `512MiB`."""

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read a size.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]i?B)?", text.strip(), re.I)
        if not found:
            raise ValueError("expected a size, e.g. 2GB or 512MiB")
        return cls(float(found[1]) * _UNITS[(found[2] or "").upper()])

    def __str__(self) -> str:
        for unit in ("GB", "MB", "KB", "GiB", "MiB", "KiB"):
            whole, rest = divmod(int(self), _UNITS[unit.upper()])
            if whole and not rest:
                return f"{whole}{unit}"
        return f"{int(self)}"


_BODY = Size(10**6)


@dataclass(frozen=True)
class SettingInfo:
    """What a setting is, the numbers that it may be, and what stands between texts of a list."""

    text: str
    least: float | None = None
    most: float | None = None
    between: str = ","


@dataclass(frozen=True)
class ServerSettings:
    """See the module's text. Every field is a flag, a variable and a key of the file."""

    model: Annotated[
        str | None, SettingInfo("Folder or hub id of a checkpoint; else the embedded one.")
    ] = None
    name: Annotated[
        str | None, SettingInfo("What the model is called; else the last part of its path.")
    ] = None
    host: Annotated[str, SettingInfo("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, SettingInfo("0 takes a free one.", 0, 65535)] = 8000
    drafter: Annotated[str, SettingInfo("NAME[:key=value,...]; see `paceline methods`.")] = "blend"
    budget: Annotated[
        str, SettingInfo("Most nodes of a tree beyond its root; auto sizes by cost.")
    ] = "auto"
    engine: Annotated[str, SettingInfo("auto, native or reference.")] = "auto"
    format: Annotated[str, SettingInfo("Of the weights, as in `paceline generate`.")] = "auto"
    kv_format: Annotated[
        str, SettingInfo("Of cached keys and values: fp32, fp16, int8; auto: fp32.")
    ] = "auto"
    device: Annotated[str | None, SettingInfo("Of the reference engine, e.g. cuda.")] = None
    threads: Annotated[
        int | None, SettingInfo("Of the native engine; else all usable cores.", 1, 1024)
    ] = None
    max_running: Annotated[int, SettingInfo("Maximum number of running requests.", 1, 4096)] = 32
    queue: Annotated[
        int, SettingInfo("Most requests that wait; those to come are told to try again.", 0)
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
            "Most memory of the process, e.g. 2GB: weights, keys and values, everything.", 1
        ),
    ] = None
    prefix_cache: Annotated[
        float,
        SettingInfo("Share of the KV memory that finished requests' prefixes may fill.", 0, 1),
    ] = 0.5
    watermark: Annotated[
        str | None, SettingInfo("Of every answer: key=SECRET, and more as in `paceline generate`.")
    ] = field(default=None, repr=False)
    watermark_choice: Annotated[
        bool, SettingInfo("Requests may bring a watermark of their own, or do without.")
    ] = False
    guides: Annotated[
        tuple[str, ...],
        SettingInfo("NAME=GUIDE with ; between them: guides that requests may name.", between=";"),
    ] = ()
    max_tokens: Annotated[int | None, SettingInfo("Most tokens of an answer.", 1)] = None
    default_tokens: Annotated[
        int | None,
        SettingInfo(
            "Tokens of an answer where the body names no number; else the context's rest.", 1
        ),
    ] = None
    max_prompt: Annotated[int | None, SettingInfo("Most tokens of a prompt.", 1)] = None
    max_answers: Annotated[
        int, SettingInfo("Most answers to one request, over all its prompts.", 1)
    ] = 128
    max_body: Annotated[Size, SettingInfo("Most bytes of a body.", 1)] = _BODY
    max_connections: Annotated[int, SettingInfo("Most connections at once.", 1)] = 1024
    head_seconds: Annotated[float, SettingInfo("For the head of a request to arrive.", 0.01)] = 10.0
    body_seconds: Annotated[float, SettingInfo("For its body.", 0.01)] = 30.0
    write_seconds: Annotated[
        float, SettingInfo("For a reader to take a piece of its stream.", 0.01)
    ] = 60.0
    idle_seconds: Annotated[
        float, SettingInfo("That a connection without requests is kept.", 0.01)
    ] = 15.0
    drain: Annotated[
        float, SettingInfo("Seconds for those under way when the server is to stop.", 0)
    ] = 30.0
    replicas: Annotated[
        int | None, SettingInfo("Engines on a Ray cluster, all behind this address.", 1, 4096)
    ] = None
    ray: Annotated[
        str | None, SettingInfo("Address of the Ray cluster; else one is started here.")
    ] = None
    keys: Annotated[
        tuple[str, ...],
        SettingInfo("API keys, NAME:KEY with commas between. In the environment only."),
    ] = field(default=(), repr=False)
    keys_file: Annotated[Path | None, SettingInfo("API keys, NAME:KEY in each line.")] = None
    request_rate: Annotated[
        float | None,
        SettingInfo("Requests a minute of each key, or address where there are no keys.", 0.001),
    ] = None
    token_rate: Annotated[
        float | None, SettingInfo("Tokens a minute likewise, read or written.", 0.001)
    ] = None
    cors: Annotated[
        tuple[str, ...], SettingInfo("Origins whose pages may use the API; * is any.")
    ] = ()
    log_prompts: Annotated[bool, SettingInfo("Write prompts and answers to the log.")] = False

    def __post_init__(self) -> None:
        for name, (kind, about) in _told().items():
            _check(name, kind, about, getattr(self, name))
        if self.watermark is not None:
            _operator_policy().parse_watermark(self.watermark)
        if self.guides:
            _operator_policy().parse_guides(self.guides)

    @classmethod
    def read(
        cls, flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
    ) -> ServerSettings:
        """The settings that flags, environment and file give; None in a flag says nothing.

        Raises:
            RequestError: a name is unknown, or a value cannot be.
        """
        given = _from_file(file) if file else {}
        given |= _from_environment(environ)
        given |= {name: value for name, value in flags.items() if value is not None}
        told = _told()
        return cls(**{name: _read(name, *told[name], value) for name, value in given.items()})

    def shown(self) -> dict[str, Any]:
        """As JSON can hold it; keys are not told, only their names, nor that of the watermark."""
        found: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            found[each.name] = str(value) if isinstance(value, Path | Size) else value
        if self.watermark is not None:
            operator_policy = _operator_policy()
            found["watermark"] = operator_policy.shown(
                operator_policy.parse_watermark(self.watermark)
            )
        return found | {"keys": [key.partition(":")[0] for key in self.keys]}


def names(secret: bool = False) -> list[str]:
    """Every setting; those that belong in no file and no flag only where `secret`."""
    return [each.name for each in fields(ServerSettings) if secret or each.name != "keys"]


def flag(name: str) -> str:
    """How a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def kind_of(name: str) -> Any:
    """The type of a setting, without None."""
    return _plain(_told()[name][0])


def rows() -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each setting."""
    defaults = ServerSettings()
    for name, (_, about) in _told().items():
        default = getattr(defaults, name)
        yield name, "" if default in (None, ()) else str(default), about.text


@cache
def _told() -> dict[str, tuple[Any, SettingInfo]]:
    """Type and meaning of each setting."""
    hints = get_type_hints(ServerSettings, include_extras=True)
    return {each.name: get_args(hints[each.name])[:2] for each in fields(ServerSettings)}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise RequestError(f"cannot read the settings in {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no {path.suffix[1:] or 'toml'}: {error!s:.100}") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path} holds no table of settings")
    if "keys" in found:
        raise RequestError(f"{path} has keys; name a file of their own in keys_file")
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
    found = {}
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
        found[name] = value
    return found


def _operator_policy() -> ModuleType:
    """Import the module, which needs the model's, only where an operator sets a policy."""
    from paceline.serving import operator_policy

    return operator_policy


def _plain(kind: Any) -> Any:
    """The type without None."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    return parts[0] if parts and get_origin(kind) is not tuple else kind


def _read(name: str, kind: Any, about: SettingInfo, value: Any) -> Any:
    """A value of the file, or the text of a flag or a variable, in the setting's type."""
    plain = _plain(kind)
    try:
        if get_origin(plain) is tuple:
            parts = value.split(about.between) if isinstance(value, str) else value
            return tuple(str(part).strip() for part in parts if str(part).strip())
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


def _check(name: str, kind: Any, about: SettingInfo, value: Any) -> None:
    """Refuse a value of another type, or out of range."""
    plain, least, most = _plain(kind), about.least, about.most
    if value is None and type(None) in get_args(kind):
        return
    wanted = tuple if get_origin(plain) is tuple else plain
    if not isinstance(value, wanted) or (isinstance(value, bool) and plain is not bool):
        raise RequestError(f"{name} is {_shown(name, value)}: {_expected(plain)}")
    if least is None:
        return
    number = float(value)  # type: ignore[arg-type]
    if not least <= number <= (most or sys.float_info.max):
        span = f"{least:g} to {most:g}" if most is not None else f"{least:g} or more"
        raise RequestError(f"{name} is {value}, expected {span}")


def _shown(name: str, value: object) -> str:
    return "something else" if name in _HIDDEN else repr(value)[:100]


def _expected(kind: Any) -> str:
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return f"expected {what.get(kind, 'a path' if kind is Path else 'a list of texts')}"
