"""The words of the story grammar: who lives in the stories, what they own and where they live. Data only.

Words are few, so that a small model sees each of them often. In every list the first ``OFTEN`` are drawn more often
than the rest: the model learns these by heart, and from the others it learns to copy what stands before it.
"""

from __future__ import annotations

OFTEN = 10


def words(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


GIRLS = words("Lily Mia Anna Emma Lucy Rosa Nora Ruby Daisy Zoe Alice Clara Ella Ivy Sara Molly Kate Maya Hana Luna")
BOYS = words("Tom Max Ben Leo Sam Finn Jack Otto Hugo Peter Bob Tim Oliver Noah Luke Adam Paul Charlie Henry Oscar")

# Kinds of beings by group, with what they hold things with.
KINDS = {
    "animal": words(
        "fox rabbit bear cat dog mouse hedgehog squirrel frog turtle wolf lion elephant monkey pig horse tiger sheep"
    ),
    "bird": words("owl duck penguin"),
    "person": words("girl boy princess knight pirate king"),
    "creature": words("dragon robot fairy unicorn"),
}
SHARE = {"animal": 58, "bird": 10, "person": 18, "creature": 14}
PAWS = {"animal": "paws", "bird": "wings", "person": "hands", "creature": "hands"}
HER_KINDS = words("girl princess fairy")
HIS_KINDS = words("boy king")
TRAITS = {
    "little": "", "young": "", "small": "", "big": "", "old": "",
    "brave": "was not afraid of anything", "kind": "always helped the others",
    "curious": "wanted to know everything", "happy": "sang all day long", "shy": "did not talk very much",
    "clever": "always had a good idea", "funny": "made everybody laugh", "lazy": "liked to sleep until noon",
    "sleepy": "yawned all day long", "proud": "did not like to ask for help", "friendly": "said hello to everyone",
}  # fmt: skip
COLOURS = words("red blue green yellow golden silver white little big old")
# Things that one finds, has, gives, loses, plays with and holds in a hand.
THINGS = (
    "ball", "kite", "boat", "drum", "bell", "hat", "lantern", "book", "key", "balloon", "umbrella", "scarf", "box",
    "flute", "map", "cup", "crown", "ring", "mirror", "shell", "stone", "coat", "spoon", "whistle", "basket",
    "blanket", "teddy bear", "doll", "train", "car", "bicycle", "guitar", "star", "feather", "clock", "lamp",
    "candle", "sword", "coin", "letter", "camera", "spaceship", "bag", "button",
)  # fmt: skip
# Where one lives: (it is said so, the place's name).
HOMES = (
    ("in the forest", "the forest"), ("on a farm", "the farm"), ("by the sea", "the sea"),
    ("in a small village", "the village"), ("in a castle", "the castle"), ("in the mountains", "the mountains"),
    ("on an island", "the island"), ("near a lake", "the lake"), ("in a big city", "the city"),
    ("in a garden", "the garden"), ("by the river", "the river"), ("in the jungle", "the jungle"),
)  # fmt: skip
SPOTS = (
    "the old tree", "the big stone", "the bridge", "the well", "the gate", "the stairs", "the bench", "the wall",
    "the little hut", "the pond", "the bushes", "the tall tower",
)  # fmt: skip
# What one may ask a story about besides: everything here can be loved, drawn and wondered at.
SUBJECTS = (
    "music", "snow", "rain", "the moon", "the stars", "the sun", "the sea", "flowers", "trees", "trains", "cars",
    "planes", "ships", "rockets", "computers", "numbers", "books", "pizza", "cheese", "honey", "cake", "apples",
)  # fmt: skip
