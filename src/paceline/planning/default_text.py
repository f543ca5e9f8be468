"""The prompts and the text of a plan for which the user names none."""

from __future__ import annotations

from paceline.measuring.prompts import QUESTIONS, Dialogue, read_prompts

_EVERY = 6  # of the questions, which come in kinds
_PROSE = (
    "A river begins as a small stream in the mountains, fed by rain, melting snow or a spring. On "
    "its way down it is joined by other streams, grows wider and slower, and carries sand and "
    "stones to the plain. Towns were built beside rivers because they gave water to drink, fish to "
    "eat and a way to travel. Where a river meets the sea it drops what it has carried, and over "
    "thousands of years a flat and fertile land is made, which is called a delta. Dams store water "
    "for dry months and turn its fall into electricity, but they also keep fish from the places "
    "where they lay their eggs. A bridge has to carry its own weight before it can carry anything "
    "else. Stone arches turn that weight into pressure, which stone bears well, and hand it down "
    "to the ground on both sides. Steel can be pulled as well as pressed, so a modern bridge may "
    "hang from cables, and a thin deck can cross a whole valley. Engineers test a model in moving "
    "air first, since wind can make a long bridge swing until it breaks. Bread is flour, water, "
    "salt and time. Yeast eats some of the sugar and breathes out gas; the gas is caught by the "
    "dough, which rises. A hot oven sets the walls of the bubbles and browns the crust. If the "
    "dough rests in the cold for a night it tastes better, because slower fermentation makes more "
    "acids. Most clocks count something that swings at a steady pace: a pendulum, a spring with a "
    "wheel, or a small crystal of quartz. An atomic clock counts the waves of light that an atom "
    "takes up, and is wrong by less than a second in a million years. Ships once found how far "
    "east they were by comparing the time at noon with a clock that still kept the time of home."
)


def default_dialogues() -> list[Dialogue]:
    """Return a few of the built-in questions, of several kinds."""
    return read_prompts(QUESTIONS)[::_EVERY]


def default_text() -> str:
    """Return a short text of several subjects on which losses are measured."""
    questions = [turn for dialogue in read_prompts(QUESTIONS) for turn in dialogue.turns]
    return "\n\n".join([_PROSE, *questions])
