"""Conversations about stories: what a chat model of this size can learn to do.

A conversation is a list of ``(role, text)`` turns, roles ``system``, ``user`` and ``assistant``. The first request
names things that the story then really has, so that the model learns to tell the story it was asked for.
"""

from __future__ import annotations

import random

from grammar import Story, Text, choose, say, story

Turns = list[tuple[str, str]]

SYSTEM = (
    "You are a storyteller.",
    "You tell little stories.",
    "You are a helpful assistant who tells stories for children.",
    "You are storyteller, a small model that tells stories.",
)
ASK = (
    "[Tell me|Please tell me|Can you tell me|I would like to hear|Write|Write me|Make up] "
    "a [|little |bedtime |nice ]story about {about}[.|!|]",
    "[Tell|Write] a story [about|with] {about}.",
    "A story about {about}, please.",
    "Do you know a story about {about}?",
    "I want a story about {about}.",
)
ASK_ANY = (
    "[Tell me|Please tell me|Can you tell me] a [|bedtime |little |good ]story[.|!|]",
    "Once upon a time...",
    "I cannot sleep.",
    "I am bored.",
    "Tell me something nice.",
    "Surprise me!",
)
ASK_SHORT = (
    "[Tell me|Write] a [very |]short story about {about}.",
    "[Tell me|Write] a story about {about} in [three|four|a few] sentences.",
)
MORE = (
    "What happened next?",
    "And then?",
    "Go on.",
    "Tell me more.",
    "How does it go on?",
    "What happened after that?",
)
SUMMARY = (
    "Can you make it shorter?",
    "[Tell|Say] it in a few sentences.",
    "Give me a summary.",
    "Sum it up, please.",
    "How does it end?",
)
TITLE = ("What is the title?", "What is the story called?", "Give it a title.", "What would be a good title?")
LESSON = (
    "What is the moral?",
    "What can I learn from it?",
    "What is the lesson of the story?",
    "What does the story teach us?",
)
AGAIN = ("[Tell me another one|Another one], please.", "Another story!", "Tell me another story.", "One more!")
THANKS = ("Thank you!", "Thanks.", "That was nice.", "I liked it!", "What a lovely story!", "Great story!")
WELCOME = (
    "You are welcome! [Shall I tell you another one?|Would you like another one?|]",
    "I am glad that you liked it. [Shall I tell you another one?|Sweet dreams!|]",
    "Thank you for listening. [I have many more.|]",
)
HELLO = ("Hello!", "Hi", "Hello", "Hi there!", "Good morning!", "Good evening.", "Hey", "How are you?")
GREETING = (
    "Hello! [Would you like to hear a story?|Shall I tell you a story?|What shall the story be about?]",
    "Hello there! I know many stories. [Would you like to hear one?|What shall it be about?]",
)
WHO = ("Who are you?", "What are you?", "What can you do?", "What is your name?", "Help", "Are you a person?")
I_AM = (
    "I am storyteller, a very small language model. I tell little stories. "
    "[Would you like to hear one?|What shall it be about?]",
    "My name is storyteller. I am a small model, and all I know is stories. [Shall I tell you one?|]",
)
OFF_TOPIC = (
    "What is the capital of [France|Italy|Japan|Peru]?",
    "What is [two plus two|12 times 7|the square root of 81]?",
    "Write a [Python|Java] program that [sorts a list|prints hello].",
    "Who won the [match|election|war]?",
    "How do I [cook rice|fix my car|learn French]?",
    "Explain [gravity|quantum physics|how a computer works].",
    "What is the weather [today|tomorrow]?",
    "Translate this into [German|Spanish].",
)
SORRY = (
    "I do not know about that, for I only know stories. [Shall I tell you one?|Would you like to hear one?]",
    "That is too hard for me. I am only a small storyteller. [But I can tell you a story!|Shall I tell you a story?]",
)
YES = ("Yes, please!", "Yes", "Yes.", "Sure", "Oh yes!", "Please do.")


def pick(rng: random.Random, lines: tuple[str, ...]) -> str:
    """One of ``lines`` with its choices made."""
    return choose(rng, rng.choice(lines)).strip()


def about(rng: random.Random, told: Story) -> str:
    """Something that ``told`` is really about, as it stands in a request."""
    world = told.world
    hero = rng.choice(
        (world.h.a, Text(world.h.kind).a, f"{world.h.a} named {world.h}", f"{world.h} the {world.h.kind}")
    )
    options = [hero, hero, rng.choice(told.topics)]
    if f"{world.f} the {world.f.kind}" in told.text:
        options.append(f"{Text(world.h.kind).a} and {Text(world.f.kind).a}")
    if world.o.full in told.text:
        options += [f"{Text(world.h.kind).a} and {Text(world.o.name).a}", world.o.a, Text(world.o.name).a]
    if rng.random() < 0.1:
        return f"{rng.choice(told.topics)} {world.home.at}"
    if rng.random() < 0.1:
        return f"{hero} and {rng.choice(told.topics)}"
    return rng.choice(options)


def ask(rng: random.Random, told: Story, lines: tuple[str, ...]) -> str:
    """A request for ``told``; now and then in lower case, as people type."""
    request = pick(rng, lines).replace("{about}", about(rng, told))
    return request.lower() if rng.random() < 0.1 else request


def follow_up(rng: random.Random, told: Story) -> Turns:
    """A question about ``told`` with its answer."""
    kind = rng.random()
    if kind < 0.45:
        question, answer = rng.choice(told.questions + general_questions(rng, told))
        return [("user", question), ("assistant", answer)]
    if kind < 0.65:
        return [("user", pick(rng, MORE)), ("assistant", told.epilogue)]
    if kind < 0.75:
        return [("user", pick(rng, SUMMARY)), ("assistant", told.short)]
    if kind < 0.85:
        return [
            ("user", pick(rng, TITLE)),
            ("assistant", choose(rng, f'[It is called "{told.title}".|"{told.title}".]')),
        ]
    return [("user", pick(rng, LESSON)), ("assistant", told.lesson)]


def general_questions(rng: random.Random, told: Story) -> tuple[tuple[str, str], ...]:
    """Questions that every story can answer."""
    pairs = [("[Who is the story about?|Who is the hero?]", "It is about {h} the {h.kind}.")]
    if told.world.home.at in told.text:
        pairs.append(("Where [does|did] {h} live?", "{h} lived {home.at}."))
    if f"{told.world.f} the {told.world.f.kind}" in told.text:
        pairs.append(("[Who is {f}?|Who was {f}?]", "{f} is a {f.kind} in the story of {h}."))
        pairs.append(("What kind of [animal|creature|being] is {f}?", "{f} is a {f.kind}."))
    pairs.append(("What kind of [animal|creature|being] is {h}?", "{h} is a {h.kind}."))
    return tuple((say(rng, q, told.world), say(rng, a, told.world)) for q, a in pairs)


def conversation(seed: int | str) -> Turns:
    """The conversation of ``seed``: perhaps a greeting, a story, a few questions, perhaps another story, thanks."""
    rng = random.Random(f"chat {seed}")
    turns: Turns = [("system", rng.choice(SYSTEM))] if rng.random() < 0.15 else []
    told = story(f"{seed} first")
    lead = rng.random()
    if lead < 0.24:
        asked, answers = rng.choice(((HELLO, GREETING), (WHO, I_AM), (OFF_TOPIC, SORRY)))
        turns += [("user", pick(rng, asked)), ("assistant", pick(rng, answers))]
        if lead < 0.06:
            return turns
    kind = rng.random()
    if turns and turns[-1][0] == "assistant" and turns[-1][1].endswith("?") and kind < 0.3:
        turns += [("user", pick(rng, YES)), ("assistant", told.text)]
    elif kind < 0.65:
        turns += [("user", ask(rng, told, ASK)), ("assistant", told.text)]
    elif kind < 0.8:
        turns += [("user", ask(rng, told, ASK_SHORT)), ("assistant", told.short)]
    else:
        turns += [("user", pick(rng, ASK_ANY)), ("assistant", told.text)]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        turns += follow_up(rng, told)
    if rng.random() < 0.08:
        other = story(f"{seed} second")
        lines = rng.choice((AGAIN, ASK))
        turns += [("user", ask(rng, other, lines)), ("assistant", other.text)]
    if rng.random() < 0.12:
        turns += [("user", pick(rng, THANKS)), ("assistant", pick(rng, WELCOME))]
    return turns
