"""The base of request bodies: null is "not given", and every other field means something.

Clients send fields that change nothing here, such as `service_tier`. Those are taken, and named in
the header `X-Paceline-Ignored` of the response. So are unknown fields that are null, which newer
clients send with an earlier answer. Other unknown fields are refused by name, unless the server
runs with `--unknown-fields warn`: then they are named in that header as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

HEADER = "X-Paceline-Ignored"
ANY: tuple[object, ...] = (...,)  # of an unused field: whatever its value
NULL: tuple[object, ...] = ()  # only if it is null


@dataclass
class Reading:
    """How the body of a request is read.

    Attributes:
        warn: unknown fields are ignored, not refused.
        ignored: names of the fields that were ignored.
    """

    warn: bool = False
    ignored: list[str] = field(default_factory=list)

    def header(self) -> str:
        """Return the value of the header; empty if nothing was ignored."""
        names = dict.fromkeys(self.ignored)
        return ", ".join(ascii(name)[1:-1] for name in names)[:1000].strip()  # printable


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


def note_ignored(name: str) -> None:
    """Name a field in the header of what was ignored."""
    if now := _reading.get():
        now.ignored.append(name)


@contextmanager
def reading(warn: bool = False) -> Iterator[Reading]:
    """Collect what is ignored in the bodies that are read inside."""
    token = _reading.set(current := Reading(warn))
    try:
        yield current
    finally:
        _reading.reset(token)


class Strict(BaseModel):
    """Forbids unknown fields, silent conversions, infinities and NaN.

    Attributes:
        unused: fields that change nothing -> the values for which that is so, besides
            null: `ANY`, `NULL` or some.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unused: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: Any) -> Any:
        """Drop nulls, and fields that change nothing."""
        if not isinstance(data, dict):
            return data
        now = _reading.get()
        known = {info.alias or name: info for name, info in cls.model_fields.items()}
        kept = {}
        for name, value in data.items():
            if name in known:
                if value is not None or known[name].is_required():
                    kept[name] = value
            elif value is None and name in cls.unused:
                continue  # as if it were not there
            elif value is None or _is_unused(value, cls.unused.get(name)) or (now and now.warn):
                if now:
                    now.ignored.append(name if isinstance(name, str) else repr(name))
            else:
                kept[name] = value
        return kept

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe nulls and unused fields, too."""
        schema = handler(core)
        target = handler.resolve_ref_schema(schema)
        if target.get("additionalProperties") is False:
            target["additionalProperties"] = {"type": "null"}
        required = set(target.get("required", ()))
        properties = target.get("properties", {})
        for name, each in properties.items():
            if name not in required and {"type": "null"} not in each.get("anyOf", ()):
                own = {key: each.pop(key) for key in list(each) if key not in _ABOUT}
                each["anyOf"] = [*own.pop("anyOf", [own] if own else []), {"type": "null"}]
        for name, values in cls.unused.items():
            allowed = {} if values == ANY else {"enum": [*values, None]}
            properties[name] = {"description": "Changes nothing here.", **allowed}
        return schema


_ABOUT = ("title", "description", "default")


def _is_unused(value: object, values: tuple[object, ...] | None) -> bool:
    if values is None:
        return False
    return values == ANY or any(value == each and type(value) is type(each) for each in values)
