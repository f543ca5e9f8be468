"""Stories of simple facts, whose questions need one, two or three of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_PEOPLE = ("Anna", "Boris", "Clara", "David", "Emma", "Felix")
_ROOMS = ("kitchen", "garden", "cellar", "attic", "library", "workshop")
_THINGS = ("lamp", "letter", "basket", "umbrella")
_GO = ("{} went to the {}.", "{} walked into the {}.", "{} moved to the {}.")
_TAKE = ("{} took the {}.", "{} picked up the {}.")
_DROP = ("{} put down the {}.", "{} left the {} there.")
_MOVES = 8  # facts of a story about people
_EVENTS = 10  # facts of a story about things
_GOING = 0.6  # share of those in which somebody moves, where anything else can happen


@dataclass(frozen=True)
class StoryQuestion:
    """A question with the beginning of its answer, and the word that completes it."""

    text: str
    lead: str
    answer: str


@dataclass(frozen=True)
class Story:
    """Facts in the order in which they happen, and what is asked behind them."""

    facts: list[str]
    questions: list[StoryQuestion]


@dataclass
class World:
    """Who is where and who holds what, told fact by fact.

    Attributes:
        rng: draws what happens.
        facts: so far.
        rooms: of the people that were told of.
        holders: of the things that somebody holds.
        places: rooms that each thing was seen in, in order, none twice in a row.
    """

    rng: np.random.Generator
    facts: list[str] = field(default_factory=list)
    rooms: dict[str, str] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def go(self, person: str) -> None:
        """Let somebody go to another room, with what they hold."""
        others = [room for room in _ROOMS if room != self.rooms.get(person)]
        room = str(self.rng.choice(others))
        self._tell(_GO, person, room)
        self.rooms[person] = room
        for thing, holder in self.holders.items():
            if holder == person:
                self.places[thing].append(room)

    def take(self, person: str, thing: str) -> None:
        """Let somebody take a thing that nobody holds, where they are."""
        self._tell(_TAKE, person, thing)
        self.holders[thing] = person
        seen = self.places.setdefault(thing, [])
        if seen[-1:] != [self.rooms[person]]:
            seen.append(self.rooms[person])

    def drop(self, thing: str) -> None:
        """Let its holder put a thing down."""
        self._tell(_DROP, self.holders.pop(thing), thing)

    def happen(self, people: list[str], things: list[str]) -> None:
        """Let anything happen that can."""
        person, thing = (str(self.rng.choice(each)) for each in (people, things))
        if person not in self.rooms or self.rng.random() < _GOING:
            self.go(person)
        elif thing in self.holders:
            self.drop(thing)
        elif self.places.get(thing, [self.rooms[person]])[-1] == self.rooms[person]:
            self.take(person, thing)
        else:  # it lies elsewhere
            self.go(person)

    def _tell(self, templates: tuple[str, ...], *words: str) -> None:
        self.facts.append(str(self.rng.choice(templates)).format(*words))


def tell_place(rng: np.random.Generator) -> Story:
    """Tell of three people, and ask where each one is: the last fact about them says it."""
    world, people = _walks(rng)
    asked = [
        StoryQuestion(f"Where is {who}?", f"{who} is in the", world.rooms[who]) for who in people
    ]
    return Story(world.facts, asked)


def tell_presence(rng: np.random.Generator) -> Story:
    """Tell of three people, and ask of each whether they are in a room: half of them are."""
    world, people = _walks(rng)
    asked = []
    for who in people:
        there, own = bool(rng.integers(2)), world.rooms[who]
        room = own if there else str(rng.choice([each for each in _ROOMS if each != own]))
        asked.append(StoryQuestion(f"Is {who} in the {room}?", "", "yes" if there else "no"))
    return Story(world.facts, asked)


def tell_thing(rng: np.random.Generator) -> Story:
    """Tell of people with things, and ask where things are: who has one, and where they went."""
    world = _things(rng, 1)
    asked = [
        StoryQuestion(f"Where is the {thing}?", f"The {thing} is in the", places[-1])
        for thing, places in world.places.items()
    ]
    return Story(world.facts, asked)


def tell_before(rng: np.random.Generator) -> Story:
    """Tell of people with things, and ask where things were before: as `tell_thing`, and when."""
    world = _things(rng, 2)
    asked = [
        StoryQuestion(
            f"Where was the {thing} before it was in the {places[-1]}?",
            f"Before, the {thing} was in the",
            places[-2],
        )
        for thing, places in world.places.items()
        if len(places) > 1
    ]
    return Story(world.facts, asked)


STORIES: dict[str, Callable[[np.random.Generator], Story]] = {
    "place": tell_place,
    "thing": tell_thing,
    "before": tell_before,
    "presence": tell_presence,
}


def _walks(rng: np.random.Generator) -> tuple[World, list[str]]:
    """Return what happened to three people who each went somewhere, and who they are."""
    world, people = World(rng), [str(each) for each in rng.choice(_PEOPLE, 3, replace=False)]
    moves = [*people, *(str(each) for each in rng.choice(people, _MOVES - len(people)))]
    for index in rng.permutation(_MOVES):
        world.go(moves[index])
    return world, people


def _things(rng: np.random.Generator, places: int) -> World:
    """Return what happened to two people and two things, one of which was in so many places."""
    people = [str(each) for each in rng.choice(_PEOPLE, 2, replace=False)]
    things = [str(each) for each in rng.choice(_THINGS, 2, replace=False)]
    while True:
        world = World(rng)
        for _ in range(_EVENTS):
            world.happen(people, things)
        if any(len(seen) >= places for seen in world.places.values()):
            return world
