"""Style transforms: the same story, told by somebody else. ``pirate`` is what the LoRA adapter learns."""

from __future__ import annotations

import random
import re

PIRATE_WORDS = {
    "you": "ye", "your": "yer", "my": "me", "mine": "me own", "yes": "aye", "hello": "ahoy", "friend": "matey",
    "friends": "mateys", "is": "be", "are": "be", "am": "be", "was": "were", "of": "o'", "and": "an'", "to": "t'",
    "them": "'em", "nobody": "no scallywag", "everyone": "all hands", "everybody": "all hands",
    "treasure": "booty", "great": "mighty", "very": "mighty", "good": "fine", "old": "salty old", "silly": "lubberly",
    "house": "cabin", "road": "sea road", "said": "growled", "asked": "bellowed", "cried": "roared", "never": "ne'er",
    "ever": "e'er", "looked": "spied", "strange": "cursed", "stop": "avast", "soup": "grog", "home": "t' port",
    "the end": "that be the end o' the yarn", "story": "yarn",
}  # fmt: skip
CRIES = (
    "Arr!", "Arrr!", "Yo ho ho!", "Shiver me timbers!", "Blow me down!", "Aye, aye!", "By the seven seas!", "Ahoy!",
    "Avast!", "Yo ho!", "By me beard!",
)  # fmt: skip
WORD = re.compile(r"\b(" + "|".join(sorted(PIRATE_WORDS, key=len, reverse=True)) + r")\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[a-z][.!?]) (?=[A-Z])")


def pirate(text: str, seed: int | str) -> str:
    """``text`` as a pirate would tell it. The openings stay, so that 'Once upon a time' still begins a story."""
    rng = random.Random(f"pirate {seed}")

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        new = PIRATE_WORDS[word.lower()]
        return new[:1].upper() + new[1:] if word[0].isupper() else new

    first, *rest = SENTENCE_END.split(text)
    told = [first]
    for sentence in rest:
        if rng.random() < 0.22:
            told.append(rng.choice(CRIES))
        told.append(re.sub(r"(\w{3,})ing\b", r"\1in'", WORD.sub(swap, sentence)))
    if rng.random() < 0.7:
        told.append(rng.choice(CRIES))
    return " ".join(told)
