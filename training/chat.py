"""Conversations about stories: what a chat model of this size can learn to do.

A conversation is a list of ``(role, text)`` turns, roles ``system``, ``user`` and ``assistant``. The first request
names things that the story then really has, so that the model learns to tell the story it was asked for.
"""

from __future__ import annotations

import random

from grammar import Story, choose, draw_world, say, story

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
    "[Hello|Hi]! [Tell me|Can you tell me] a story about {about}.",
    "{about}",
    "I want a story about {about}.",
)
LEADS = (
    "[Here is|This is] a story about {about}.",
    "A story about {about}[!|.|? Gladly!]",
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


def about(rng: random.Random, told: Story, text: str) -> str:
    """Something that ``text``, which is ``told`` or its short form, is really about, as it stands in a request."""
    hero, friend, thing, home = told.world.h, told.world.f, told.world.o, told.world.home
    who = rng.choice((hero.a, hero.an, hero.an, f"{hero.a} named {hero}", f"{hero.an} called {hero}", f"{hero}",
                      f"{hero} the {hero.kind}"))  # fmt: skip
    kind = rng.random()
    if kind < 0.2:
        return rng.choice((f"{hero.an} and {friend.an}", f"{hero} and {friend}", f"{who} and {friend}",
                           f"{hero} the {hero.kind} and {friend} the {friend.kind}"))  # fmt: skip
    if kind < 0.45 and thing.full in text:
        return rng.choice((thing.an, thing.a, f"{who} and {thing.a}", f"{who} and {thing.an}", f"{who} with {thing.a}"))
    if kind < 0.6 and home.at in text:
        return rng.choice((f"{who} {home.at}", f"{who} {home.at}", home.the, f"{who} who lives {home.at}"))
    if kind < 0.75 or (told.plot == "subject" and kind < 0.9):
        topic = rng.choice(told.topics)
        return rng.choice((topic, topic, f"{who} and {topic}"))
    return who


def request(rng: random.Random, told: Story, lines: tuple[str, ...], text: str) -> Turns:
    """A request for ``told`` and the answer ``text``; now and then in lower case, as people type.

    Most answers first say what was asked for: a small model then keeps to it.
    """
    subject = about(rng, told, text)
    asked = pick(rng, lines).replace("{about}", subject)
    lead = choose(rng, rng.choice(LEADS)).replace("{about}", subject) + "\n\n" if rng.random() < 0.6 else ""
    if rng.random() < 0.15:
        asked = asked.lower()
    return [("user", asked.rstrip(".!") if rng.random() < 0.2 else asked), ("assistant", lead + text)]


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
        pairs.append(("Where [does|did] {h} live?", "{h} the {h.kind} lived {home.at}."))
    pairs.append(("[Who is {f}?|Who was {f}?]", "{f} is {f.an} and a friend of {h}."))
    pairs.append(("Who is {h}'s friend?", "{h}'s friend is {f} the {f.kind}."))
    pairs.append(("What kind of [animal|creature|being] is {f}?", "{f} is {f.an}."))
    pairs.append(("What kind of [animal|creature|being] is {h}?", "{h} is {h.an}."))
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
    elif kind < 0.72:
        turns += request(rng, told, ASK, told.text)
    elif kind < 0.85:
        turns += request(rng, told, ASK_SHORT, told.short)
    else:
        turns += [("user", pick(rng, ASK_ANY)), ("assistant", told.text)]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        turns += follow_up(rng, told)
    if rng.random() < 0.08:
        other = story(f"{seed} second")
        again = [("user", pick(rng, AGAIN)), ("assistant", other.text)]
        turns += again if rng.random() < 0.4 else request(rng, other, ASK, other.text)
    if rng.random() < 0.12:
        turns += [("user", pick(rng, THANKS)), ("assistant", pick(rng, WELCOME))]
    return turns


def recall(seed: int | str) -> Turns:
    """Short turns that are full of what was said before: who is what, where they live and what they have.

    In a story such a fact comes back two or three times; a small model needs it more often to learn to look it up.
    """
    rng = random.Random(f"recall {seed}")
    worlds = [draw_world(rng) for _ in range(3)]
    cast = {world.h.name: world for world in worlds}
    who = [f"{world.h} the {world.h.kind}" for world in cast.values()]
    facts = ("{h} the {h.kind} lives {home.at}.", "{h} is {h.an}.", "{h} the {h.kind} has {o.a}.")
    told = [say(rng, fact, world) for world in cast.values() for fact in rng.sample(facts, 2)]
    if rng.random() < 0.5:
        told += [f"{a} met {b}. " + rng.choice((f'"Hello," said {a} to {b}.', f"And {b} met {rng.choice(who)}."))
                 for a, b in (rng.sample(who, 2) for _ in range(5))] if len(who) > 1 else []  # fmt: skip
        return [("user", "Tell me about your friends."), ("assistant", " ".join(told))]
    turns = [("user", "Who are your friends?"), ("assistant", "My friends are " + " and ".join(who) + ".")]
    for _ in range(6):
        world = rng.choice(worlds)
        question = say(rng, rng.choice(("Who is {h}?", "What kind of being is {h}?", "Do you know {h}?")), world)
        answer = "{h} is {h.an}." if question[0] != "D" else "Yes, {h} the {h.kind} is a friend of mine."
        turns += [("user", question), ("assistant", say(rng, answer, world))]
    return turns
