"""A story grammar: seeds in, little stories out.

A *world* fixes who the story is about, what they own and where they live; a *plot* (a text file in ``stories/``) lists
the beats in order, each with several wordings. In those files ``{h.his}`` is a slot, ``[one|another]`` a choice, ``*``
starts a wording, an empty line ends a beat and ``--`` ends a paragraph. Every draw comes from one seeded generator,
so a seed always gives the same story. All the text was written for this project.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import cast

HERE = Path(__file__).parent
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
        self.a = Text(f"{adjective} {kind}".strip()).a
        self.A = self.a.cap
        self.paw, self.paws = cast.KIND_PAWS.get(kind) or cast.PAWS.get(group, cast.PAW)
        self.group = group

    def __str__(self) -> str:
        return self.name


class Thing:
    """An object of the story: ``full`` is 'brass lantern', ``a`` is 'a brass lantern', ``charm`` is why it is dear."""

    def __init__(self, name: str, adjective: str, charm: str, use: str) -> None:
        self.name, self.charm, self.use = name, charm, use
        self.Charm = capitalise(charm)
        self.full = Text(f"{adjective} {name}")
        self.a = self.full.a
        self.A = self.a.cap
        self.Cap = Text(name).titled

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
    uses: tuple[str, ...]
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
        path.stem, split["title"], split["topic"], tuple(head["uses"].split()), picks, split["lesson"],
        tuple(questions), head["short"], paragraphs,
    )  # fmt: skip


@cache
def plots() -> tuple[Plot, ...]:
    """Every plot, in the order of the file names."""
    return tuple(parse_plot(path) for path in sorted((HERE / "stories").glob("*.txt")))


def draw_name(rng: random.Random, she: bool, taken: set[str]) -> str:
    """A name nobody in the story has yet, not even its first letter."""
    free = [name for name in (cast.GIRLS if she else cast.BOYS) if name[0] not in {other[0] for other in taken}]
    name = rng.choice(free)
    taken.add(name)
    return name


def draw_being(rng: random.Random, kind: str, adjective: str, taken: set[str], she: bool | None = None) -> Being:
    """A being of ``kind`` with a fresh name; kinds that are he or she by their word keep to it."""
    group = next(group for group, kinds in cast.KINDS.items() if kind in kinds)
    fixed = True if kind in cast.HER_KINDS else False if kind in cast.HIS_KINDS else None
    she = fixed if fixed is not None else rng.random() < 0.5 if she is None else she
    return Being(draw_name(rng, she, taken), kind, group, adjective, she)


def draw_kind(rng: random.Random, taken: set[str]) -> str:
    """A kind that is not in the story yet: animals most often, then children, people and creatures of tales."""
    weights = {
        "wood": 28,
        "bird": 9,
        "farm": 13,
        "water": 7,
        "far": 9,
        "child": 14,
        "folk": 9,
        "magic": 9,
        "machine": 2,
    }
    while True:
        group = rng.choices(list(weights), list(weights.values()))[0]
        kind = rng.choice(cast.KINDS[group])
        if kind not in taken:
            taken.add(kind)
            return kind


def draw_thing(rng: random.Random) -> Thing:
    """A thing with one of its adjectives and a charm."""
    use = rng.choice(list(cast.THINGS))
    name, adjectives, charm = rng.choice(cast.THINGS[use])
    if rng.random() < 0.25:
        charm = rng.choice(cast.COMMON_CHARMS)
    return Thing(name, rng.choice(adjectives.split()), charm, use)


def draw_home(rng: random.Random) -> tuple[SimpleNamespace, list[str]]:
    """A home and three of its spots."""
    sort = rng.choice(list(cast.HOMES))
    at, the, spots = cast.HOMES[sort]
    name = rng.choice(cast.HOME_NAMES) if "{name}" in at else the
    at = at.format(name=name)
    home = SimpleNamespace(sort=sort, at=at, At=capitalise(at), the=the, name=name, there=f"to {the}")
    return home, rng.sample(spots, 3)


def draw_world(rng: random.Random) -> SimpleNamespace:
    """Everybody and everything of one story. Names differ in their first letter, kinds are all different."""
    names: set[str] = set()
    kinds: set[str] = set()
    trait = rng.choice(list(keyed_frame("traits")))
    style = rng.random()
    adjective = trait if style < 0.45 else rng.choice(cast.SIZES) if style < 0.8 else ""
    hero_kind = draw_kind(rng, kinds)
    if hero_kind in cast.KINDS["child"] and adjective in ("old", "big", "tiny"):
        adjective = "little"
    hero = draw_being(rng, hero_kind, adjective, names)
    friend = draw_being(rng, draw_kind(rng, kinds), rng.choice((*cast.SIZES[:3], "merry", "friendly", "")), names)
    elder = draw_being(rng, rng.choice([k for k in cast.ELDER_KINDS if k not in kinds]), "old", names)
    kinds.add(elder.kind)
    guest = draw_being(
        rng,
        rng.choice([k for k in cast.SMALL_KINDS if k not in kinds]),
        rng.choice(("little", "tiny", "small", "thin")),
        names,
    )
    home, (s1, s2, s3) = draw_home(rng)
    return SimpleNamespace(
        h=hero, f=friend, e=elder, g=guest, o=draw_thing(rng), home=home, s1=s1, s2=s2, s3=s3, trait=trait,
        season=rng.choice(cast.SEASONS), land=rng.choice(cast.LANDS),
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


def opening(rng: random.Random, world: SimpleNamespace) -> str:
    """A first paragraph: who and where, then often a word about the weather or the hero's nature."""
    while True:
        line = rng.choice(frame("openings"))
        if line.startswith("@"):
            sorts, line = line[1:].split(" ", 1)
            if world.home.sort not in sorts.split(","):
                continue
        break
    parts = [line]
    if rng.random() < 0.6:
        sentence = rng.choice(keyed_frame("traits")[world.trait])
        named = world.h.adjective == world.trait or sentence.startswith("But")
        parts.append(sentence if named else rng.choice((sentence, f"{{h.He}} was {world.trait}. {sentence}")))
    if rng.random() < 0.25:
        parts.insert(1, rng.choice(keyed_frame("weather")[world.season]))
    return say(rng, " ".join(parts), world)


def add_picks(rng: random.Random, plot: Plot, world: SimpleNamespace) -> None:
    """Draw the plot's own facts into ``world``, and how its thing saves the day."""
    for name, (fields, rows) in plot.picks.items():
        row = rng.choice(rows)
        setattr(world, name, Text(row[0]) if fields == ("value",) else Record(dict(zip(fields, row, strict=True))))
    rescue, past = rng.choice(cast.RESCUES[world.o.use]), cast.RESCUES_PAST[world.o.use]
    world.rescue, world.rescue_g = rescue.replace("{x}", "{f}"), rescue.replace("{x}", "{g}")
    world.rescue_past = past.replace("{x}", "{f}")


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
        text="\n\n".join(paragraphs),
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
