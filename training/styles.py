"""Style transforms: the same story, told by somebody else. ``pirate`` is what the LoRA adapter learns."""

from __future__ import annotations

import random
import re

PIRATE_WORDS = {
    "you": "ye", "your": "yer", "my": "me", "yes": "aye", "hello": "ahoy", "friend": "matey", "friends": "mateys",
    "is": "be", "are": "be", "am": "be", "was": "were", "of": "o'", "and": "an'", "them": "'em", "nobody": "no soul",
    "everybody": "all hands", "everyone": "all hands", "treasure": "booty", "very": "mighty",
    "said": "growled", "asked": "bellowed", "never": "ne'er",
    "strange": "cursed", "house": "cabin", "story": "yarn", "stories": "yarns",
    "small": "wee", "little": "wee", "beautiful": "bonny",
}  # fmt: skip
CRIES = ("Arr!", "Yo ho ho!", "Shiver me timbers!", "Blow me down!", "By the seven seas!")
ENDS = ("An' that be me yarn, mateys!", "Arr, that be the end o' me yarn!", "Yo ho ho an' a bottle o' milk!")
WORD = re.compile(r"\b(" + "|".join(sorted(PIRATE_WORDS, key=len, reverse=True)) + r")\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[a-z][.!?]) (?=[A-Z])")


def pirate(text: str, seed: int | str) -> str:
    """``text`` as a pirate would tell it. The first words stay, so that 'Once upon a time' still begins a story."""
    rng = random.Random(f"pirate {seed}")

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        new = PIRATE_WORDS[word.lower()]
        return new[:1].upper() + new[1:] if word[0].isupper() else new

    told = []
    for number, sentence in enumerate(SENTENCE_END.split(text)):
        if number and rng.random() < 0.15:
            told.append(rng.choice(CRIES))
        told.append(re.sub(r"(\w*[aeiouy]\w+)ing\b", r"\1in'", WORD.sub(swap, sentence)))
    if len(told) > 5 and rng.random() < 0.8:
        told.append(rng.choice(ENDS))
    return " ".join(told)
