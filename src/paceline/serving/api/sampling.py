"""The controls that a body names, by the fields of other servers or as in `--sampler`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from paceline.control.base import ControlMethod
from paceline.control.sampler_spec import SamplerSpec
from paceline.errors import RequestError
from paceline.serving.api.schemas import SamplingBody


class _Field(NamedTuple):
    """A field of the body: its control setting, what turns it off, and a field it requires."""

    key: str
    off: Callable[[Any], bool] | None = None
    needs: str | None = None


_FIELDS = {
    "top_p": _Field("top_p", lambda p: p == 1),
    "top_k": _Field("top_k", lambda k: k in (-1, 0)),
    "min_p": _Field("min_p", lambda p: p == 0),
    "top_a": _Field("top_a"),
    "typical_p": _Field("typical"),
    "top_n_sigma": _Field("top_n_sigma", lambda n: n < 0),
    "frequency_penalty": _Field("frequency_penalty", lambda p: p == 0),
    "presence_penalty": _Field("presence_penalty", lambda p: p == 0),
    "repetition_penalty": _Field("repetition_penalty", lambda p: p == 1),
    "no_repeat_ngram_size": _Field("no_repeat_ngram", lambda n: n == 0),
    "logit_bias": _Field("logit_bias"),
    "bad_words": _Field("bad_words"),
    "min_tokens": _Field("min_length", lambda n: n == 0),
    "xtc_probability": _Field("xtc.probability", lambda p: p == 0),
    "xtc_threshold": _Field("xtc.threshold", needs="xtc_probability"),
    "dry_multiplier": _Field("dry", lambda m: m == 0),
    "dry_base": _Field("dry.base", needs="dry_multiplier"),
    "dry_allowed_length": _Field("dry.allowed", needs="dry_multiplier"),
    "dry_sequence_breakers": _Field("dry.breakers", needs="dry_multiplier"),
    "mirostat_mode": _Field("mirostat", lambda mode: mode == 0),
    "mirostat_tau": _Field("mirostat.tau", needs="mirostat_mode"),
    "mirostat_eta": _Field("mirostat.eta", needs="mirostat_mode"),
}


def sampling(body: SamplingBody, defaults: Mapping[str, float]) -> dict[str, Any]:
    """Return `temperature` and `controls` for `LM.request`.

    Args:
        body: of the request.
        defaults: settings of the checkpoint, each for bodies that say nothing of it.

    Raises:
        PacelineError: a control is unknown, out of range, given twice, or names a path on the
            server; or a field lacks the one it requires.
    """
    named, off = _named(body)
    own = _own_sampler(body)
    for method in own.methods:
        _check_paths(method)
    temperatures = {each for each in (body.temperature, own.temperature) if each is not None}
    if len(temperatures) > 1:
        raise RequestError(
            f"temperature is {body.temperature:g}, and in sampler it is {own.temperature:g}; "
            "give one of them"
        )
    said = off | {key.partition(".")[0] for key in named} | {each.name for each in own.methods}
    rest = {name: value for name, value in defaults.items() if name not in said}
    methods = (*SamplerSpec.of({**rest, **named}).methods, *own.methods)
    return {
        "temperature": next(iter(temperatures), None),
        "controls": SamplerSpec(methods=methods).methods,
    }


def fields_in_sampler(body: SamplingBody) -> set[str]:
    """Return the fields of a body that its `sampler` gives in their stead.

    Raises:
        PacelineError: the sampler is wrong.
    """
    own = _own_sampler(body)
    names = {each.name for each in own.methods}
    fields = {name for name, each in _FIELDS.items() if each.key.partition(".")[0] in names}
    return fields if own.temperature is None else fields | {"temperature"}


def _own_sampler(body: SamplingBody) -> SamplerSpec:
    text = {} if body.sampler is None else body.sampler
    return SamplerSpec.parse(text) if isinstance(text, str) else SamplerSpec.of(text)


def _named(body: SamplingBody) -> tuple[Mapping[str, object], set[str]]:
    """Return the settings that the fields give, and the controls that they turn off."""
    given = {name: value for name in _FIELDS if (value := getattr(body, name)) is not None}
    settings: dict[str, object] = {}
    turned_off: set[str] = set()
    for name, value in given.items():
        field = _FIELDS[name]
        other = field.needs or name
        if other not in given:
            raise RequestError(f"{name} needs {other}; give both")
        off = _FIELDS[other].off
        if off and off(given[other]):
            turned_off.add(_FIELDS[other].key.partition(".")[0])
        else:
            settings[field.key] = value
    if "mirostat" in settings:  # a mode, not a setting; only mode 2 exists here
        del settings["mirostat"]
        settings.setdefault("mirostat.tau", 5.0)
    return settings, turned_off


def _check_paths(method: ControlMethod) -> None:
    for name in method.paths:
        if getattr(method, name):
            control = getattr(method, "name", type(method).__name__)
            raise RequestError(
                f"{control}.{name} names a path on the server, which is not allowed; remove it"
            )
