"""A story grammar: seeds in, little stories out.

A *world* fixes who the story is about, a friend, a thing and a place; a *plot* (a text file in ``stories/``) lists
the beats in order, each with several wordings. In those files ``{h.his}`` is a slot, ``[one|another]`` a choice, ``*``
starts a wording, an empty line ends a beat and ``--`` ends a paragraph. Every draw comes from one seeded generator,
so a seed always gives the same story. All the text was written for this project.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import cast

HERE = Path(__file__).parent
T = TypeVar("T")
CHOICE = re.compile(r"\[([^\[\]]*)\]")


class Text(str):
    """A string that knows its forms: ``.a`` with an article, ``.cap`` as a sentence begins, ``.titled`` as a title."""

    __slots__ = ()

    @property
    def a(self) -> Text:
        """With its indefinite article."""
        return Text(f"{article(self)} {self}")

    @property
    def cap(self) -> Text:
        """First letter upper case."""
        return Text(capitalise(self))

    Cap = cap

    @property
    def the(self) -> Text:
        """With 'the' in place of its indefinite article."""
        return Text(re.sub(r"^an? ", "the ", self))

    @property
    def titled(self) -> Text:
        """Every longer word upper case."""
        return Text(" ".join(w if w in ("of", "the", "a") else capitalise(w) for w in self.split(" ")))


def capitalise(text: str) -> str:
    """``text`` with its first letter upper case."""
    return text[:1].upper() + text[1:]


def article(text: str) -> str:
    """'a' or 'an' before ``text``."""
    silent_h = text.startswith(("hour", "honest"))
    return "an" if silent_h or (text[0].lower() in "aeiou" and not text.startswith(("uni", "one"))) else "a"


class Being:
    """One of the cast: a name, a kind and the pronouns that go with it. ``she`` is true for she/her."""

    def __init__(self, name: str, kind: str, group: str, adjective: str, she: bool) -> None:
        self.name, self.kind, self.adjective, self.she = name, kind, adjective, she
        self.he, self.him, self.his, self.hers, self.self = (
            ("she", "her", "her", "hers", "herself") if she else ("he", "him", "his", "his", "himself")
        )
        self.He, self.His = self.he.capitalize(), self.his.capitalize()
        self.an = Text(kind).a
        self.a = Text(f"{adjective} {kind}".strip()).a
        self.paws = cast.PAWS[group]

    def __str__(self) -> str:
        return self.name


class Thing:
    """An object of the story: ``full`` is 'red kite', ``a`` is 'a red kite', ``lost`` is 'a lost kite'."""

    def __init__(self, name: str, colour: str) -> None:
        self.name = name
        self.full = Text(f"{colour} {name}")
        self.a = self.full.a
        self.A = self.a.cap
        self.an = Text(name).a
        self.Cap = Text(name).titled
        self.lost, self.found, self.broken = (f"a {what} {name}" for what in ("lost", "found", "broken"))

    def __str__(self) -> str:
        return self.name


class Record:
    """A drawn record of a plot, such as a skill; ``{skill.Do}`` is the title form of ``{skill.do}``."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = {key: Text(value) for key, value in fields.items()}

    def __getattr__(self, key: str) -> Text:
        fields = self.__dict__["fields"]
        if key.lower() not in fields:
            raise AttributeError(f"the record has {', '.join(fields)}, not {key}")
        return fields[key] if key in fields else fields[key.lower()].titled

    def __str__(self) -> str:
        return next(iter(self.fields.values()))


@dataclass(frozen=True)
class Plot:
    """One plot file. ``paragraphs`` -> beats -> wordings; ``picks`` maps a name to (fields, rows)."""

    name: str
    titles: tuple[str, ...]
    topics: tuple[str, ...]
    picks: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]]
    lessons: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    short: str
    paragraphs: tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class Story:
    """A finished story with what can be asked about it. ``text`` has paragraphs separated by empty lines."""

    plot: str
    title: str
    text: str
    short: str
    lesson: str
    topics: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    epilogue: str
    world: SimpleNamespace


def wordings(text: str) -> tuple[str, ...]:
    """The ``*`` lines of one beat."""
    return tuple(line[2:].strip() for line in text.strip().splitlines() if line.startswith("* "))


@cache
def frame(name: str) -> tuple[str, ...]:
    """The wordings in ``frame/<name>.txt``."""
    return wordings((HERE / "frame" / f"{name}.txt").read_text(encoding="utf-8"))


@cache
def keyed_frame(name: str) -> dict[str, tuple[str, ...]]:
    """``frame/<name>.txt`` whose lines are ``* key: wording / wording``."""
    pairs = (line.split(": ", 1) for line in frame(name))
    return {key: tuple(rest.split(" / ")) for key, rest in pairs}


def parse_pick(spec: str, body: str) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """``pick skill.do.fail`` with ``a; b / c; d``, or ``pick reason`` with ``a; b; c`` (one field)."""
    name, *fields = spec.split(".")
    if not fields:
        return name, ("value",), tuple((row.strip(),) for row in body.split(";"))
    rows = tuple(tuple(cell.strip() for cell in row.split(";")) for row in body.split(" / "))
    for row in rows:
        if len(row) != len(fields):
            raise ValueError(f"pick {spec}: {len(fields)} fields expected in {row}")
    return name, tuple(fields), rows


def parse_plot(path: Path) -> Plot:
    """Read one file of ``stories/``."""
    head: dict[str, str] = {}
    picks: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {}
    questions: list[tuple[str, str]] = []
    body: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(": ")
        if line.startswith("* ") or line in ("", "--"):
            body.append(line)
        elif key == "ask":
            question, answer = value.split(" => ")
            questions.append((question, answer))
        elif key.startswith("pick "):
            name, fields, rows = parse_pick(key[5:], value)
            picks[name] = (fields, rows)
        else:
            head[key] = value
    paragraphs = tuple(
        tuple(beat for part in paragraph.split("\n\n") if (beat := wordings(part)))
        for paragraph in "\n".join(body).split("\n--\n")
    )
    split = {key: tuple(head[key].split(" / ")) for key in ("title", "topic", "lesson")}
    return Plot(
        path.stem, split["title"], split["topic"], picks, split["lesson"],
        tuple(questions), head["short"], paragraphs,
    )  # fmt: skip


@cache
def plots() -> tuple[Plot, ...]:
    """Every plot, in the order of the file names."""
    return tuple(parse_plot(path) for path in sorted((HERE / "stories").glob("*.txt")))


def draw(rng: random.Random, options: Sequence[T]) -> T:
    """One of ``options``; half of all draws are among the first ``cast.OFTEN``."""
    return rng.choice(options[: cast.OFTEN] if rng.random() < 0.5 else options)


def draw_being(rng: random.Random, taken: list[Being], adjective: str = "") -> Being:
    """A being unlike those in ``taken``: another name and another kind. Some kinds are he or she by their word."""
    while True:
        group = rng.choices(list(cast.SHARE), list(cast.SHARE.values()))[0]
        kind = draw(rng, cast.KINDS[group])
        she = kind in cast.HER_KINDS or (kind not in cast.HIS_KINDS and rng.random() < 0.5)
        name = draw(rng, cast.GIRLS if she else cast.BOYS)
        if all(name != other.name and kind != other.kind for other in taken):
            return Being(name, kind, group, "young" if kind in ("girl", "boy") and adjective else adjective, she)


def draw_world(rng: random.Random) -> SimpleNamespace:
    """Everybody and everything of one story: the hero ``h``, the friend ``f``, the thing ``o``, home and two spots."""
    trait = rng.choice(list(cast.TRAITS))
    hero = draw_being(rng, [], trait if rng.random() < 0.7 else "")
    friend = draw_being(rng, [hero])
    at, the = draw(rng, cast.HOMES)
    s1, s2 = rng.sample(cast.SPOTS, 2)
    return SimpleNamespace(
        h=hero, f=friend, o=Thing(draw(rng, cast.THINGS), rng.choice(cast.COLOURS)), trait=trait,
        home=SimpleNamespace(at=at, At=capitalise(at), the=the), s1=Text(s1), s2=Text(s2),
        season=rng.choice(list(keyed_frame("weather"))), subject=Text(draw(rng, cast.SUBJECTS)),
    )  # fmt: skip


def choose(rng: random.Random, template: str) -> str:
    """Resolve every ``[one|another]``, inner ones first."""
    while "[" in template:
        template = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return template


def fill(template: str, world: SimpleNamespace) -> str:
    """Put the world into the slots; a slot's own text may hold slots, so until none is left."""
    while "{" in template:
        template = template.format_map(vars(world))
    return template


def tidy(text: str) -> str:
    """Mend what slots leave behind: sentence starts, articles, doubled spaces."""
    text = re.sub(
        r"\b([Aa])n? (?=([a-zA-Z]))", lambda m: f"{'A' if m[1] == 'A' else 'a'}{article(text[m.end() :])[1:]} ", text
    )
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r"(^|\n|[.!?] |[.]\" |(?<!,)\s\")([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text


def say(rng: random.Random, template: str, world: SimpleNamespace) -> str:
    """One wording as finished text. Choices may sit inside slots and slots inside choices."""
    text = template
    while "[" in text or "{" in text:
        text = fill(choose(rng, text), world)
    return tidy(text)


def once(text: str, world: SimpleNamespace) -> str:
    """``text`` with only the first of every 'Lily the fox'; later ones are the name alone, as people tell it."""
    for being in (world.h, world.f):
        head, the, rest = text.partition(f"{being.name} the {being.kind}")
        text = head + the + rest.replace(the, being.name) if the else text
    return text


def opening(rng: random.Random, world: SimpleNamespace) -> str:
    """A first paragraph: who and where, then often a word about the weather or the hero's nature."""
    parts = [rng.choice(frame("openings"))]
    habit = cast.TRAITS[world.trait]
    if habit and rng.random() < 0.4:
        parts.append(f"{{h.He}} {habit}.")
    elif rng.random() < 0.2:
        parts.append(rng.choice(keyed_frame("weather")[world.season]))
    return say(rng, " ".join(parts), world)


def add_picks(rng: random.Random, plot: Plot, world: SimpleNamespace) -> None:
    """Draw the plot's own facts into ``world``."""
    for name, (fields, rows) in plot.picks.items():
        row = rng.choice(rows)
        setattr(world, name, Text(row[0]) if fields == ("value",) else Record(dict(zip(fields, row, strict=True))))


def story(seed: int | str) -> Story:
    """The story of ``seed``: the same seed gives the same story on every machine."""
    rng = random.Random(f"story {seed}")
    plot, world = rng.choice(plots()), draw_world(rng)
    add_picks(rng, plot, world)
    paragraphs = [opening(rng, world)]
    for beats in plot.paragraphs:
        paragraphs.append(" ".join(say(rng, rng.choice(beat), world) for beat in beats))
    if rng.random() < 0.25:
        paragraphs.append(say(rng, rng.choice(frame("closings")), world))
    if rng.random() < 0.5:  # the first two paragraphs may run together
        paragraphs[:2] = [" ".join(paragraphs[:2])]
    return Story(
        plot=plot.name,
        title=capitalise(say(rng, rng.choice(plot.titles), world)),
        text=once("\n\n".join(paragraphs), world),
        short=say(rng, plot.short, world),
        lesson=say(rng, rng.choice(plot.lessons), world),
        topics=tuple(fill(topic, world) for topic in plot.topics),
        questions=tuple((say(rng, q, world), say(rng, a, world)) for q, a in plot.questions),
        epilogue=say(rng, rng.choice(frame("epilogues")), world),
        world=world,
    )


def main() -> None:
    """Print a few stories: ``python training/grammar.py [seed ...]``."""
    import sys

    for seed in sys.argv[1:] or ["1", "2", "3"]:
        told = story(seed)
        print(f"{told.title}\n\n{told.text}\n\n---\n")


if __name__ == "__main__":
    main()
