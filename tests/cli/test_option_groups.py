from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from paceline.cli.option_groups import spread


@dataclass(frozen=True)
class Size:
    """How large it is.

    More of it.
    """

    wide: Annotated[int, typer.Option(min=1, help="In metres.")]
    tall: Annotated[float, typer.Option("--height", help="Likewise.")] = 2.5


@dataclass(frozen=True)
class Painted(Size):
    """How it looks."""

    colours: Annotated[list[str], typer.Option(help="One or more.")] = field(
        default_factory=lambda: ["red"]
    )


def run(verb, *words):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(spread(verb))
    done = CliRunner().invoke(app, [*map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_group_arrives_as_one_object():
    seen = []

    def verb(name: Annotated[str, typer.Argument()], *, size: Size, dry: bool = False) -> None:
        seen.append((name, size, dry))

    assert run(verb, "box", "--wide", 3, "--dry").exit_code == 0
    assert run(verb, "--height", "0.5", "--wide", 1, "box").exit_code == 0
    assert seen == [("box", Size(3, 2.5), True), ("box", Size(1, 0.5), False)]


def test_what_options_refuse_groups_refuse():
    def verb(*, size: Size) -> None:
        raise AssertionError

    for words in ((), ("--wide", 0), ("--wide", "x"), ("--wide", 1, "--tall", 2)):
        assert run(verb, *words).exit_code == 2


def test_a_group_may_extend_another():
    seen = []

    def verb(*, look: Painted) -> None:
        seen.append(look)

    run(verb, "--wide", 1)
    run(verb, "--wide", 1, "--colours", "blue", "--colours", "green")
    assert seen == [Painted(1, 2.5, ["red"]), Painted(1, 2.5, ["blue", "green"])]
    shown = run(verb, "--help").output
    assert "How it looks" in shown
    assert "How large it is" not in shown


def test_help_has_a_panel_for_each_group():
    def verb(*, size: Size, json: Annotated[bool, typer.Option("--json")] = False) -> None:
        """Do it."""

    shown = run(verb, "--help").output
    assert "Do it." in shown
    options, panel = shown.split("How large it is")
    assert "--json" in options
    assert "--wide" in panel
    assert "More of it" not in shown
    assert Size.__dataclass_fields__["tall"].default == 2.5


def test_two_groups_cannot_have_the_same_option():
    def verb(*, size: Size, look: Painted) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="duplicate parameter name"):
        spread(verb)


def test_a_verb_without_groups_stays_as_it_is():
    def verb(json: bool = False) -> None:
        raise AssertionError

    assert spread(verb) is verb
