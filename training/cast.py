"""The words of the story grammar: who lives in the stories, what they own and where they live. Data only."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


# Few names, so that a small model learns to keep them apart within a story.
GIRLS = words("Lily Mira Ada Rosa Ivy Clara Nora Zoe Emma Hana Wren Daisy")
BOYS = words("Tom Max Sam Ben Leo Finn Otto Jack Hugo Kofi Peter Oliver")

# Kinds of beings by group; the group decides where they live and what they do their work with.
KINDS = {
    "wood": words(
        """
        fox hare badger hedgehog squirrel bear wolf mouse mole deer rabbit weasel raccoon porcupine fawn lynx bat
        beetle snail spider chipmunk bobcat skunk
        """
    ),
    "bird": words(
        """
        owl crow sparrow robin wren magpie jackdaw stork swan goose duckling penguin parrot swallow eagle heron
        raven peacock
        """
    ),
    "farm": words("cat dog goat lamb donkey pony hen pig calf kitten puppy sheep horse cow rooster piglet foal bull"),
    "water": words("frog otter beaver turtle toad crab seal newt walrus water-rat"),
    "far": words(
        """
        elephant lion tiger monkey giraffe zebra camel kangaroo koala panda crocodile hippo rhino lizard llama
        leopard sloth yak
        """
    ),
    "child": words("girl boy"),
    "folk": words(
        """
        baker sailor shepherd miller knight princess prince wizard witch tailor fisherman gardener painter farmer
        king queen weaver potter cook inventor pirate musician woodcutter postman clockmaker doctor teacher
        soldier dancer astronaut
        """
    ),
    "magic": words(
        """
        dragon unicorn giant elf fairy gnome troll ghost goblin mermaid dwarf snowman phoenix griffin monster
        """
    ),
    "machine": words("robot"),
}
HER_KINDS = words("girl princess witch queen mermaid hen cow fairy")
HIS_KINDS = words("boy prince wizard king fisherman rooster bull postman snowman")
ELDER_KINDS = words(
    """
    owl badger turtle bear goat toad heron miller sailor shepherd clockmaker gardener potter weaver raven donkey
    """
)
SMALL_KINDS = words(
    """
    mouse mole hedgehog squirrel sparrow robin wren duckling kitten lamb frog rabbit snail newt elf gnome beetle
    chipmunk piglet fawn
    """
)
# What a being holds things with, by group; the kinds below differ from their group.
PAW = ("paw", "paws")
PAWS = {"bird": ("wing", "wings"), "child": ("hand", "hands"), "folk": ("hand", "hands"), "machine": ("hand", "hands")}
KIND_PAWS = {
    **dict.fromkeys(words("dragon crab lizard"), ("claw", "claws")),
    **dict.fromkeys(
        words("elf fairy gnome giant troll ghost goblin mermaid dwarf snowman monster monkey frog"),
        ("hand", "hands"),
    ),
    **dict.fromkeys(words("phoenix"), ("wing", "wings")),
    **dict.fromkeys(
        words(
            """
            goat lamb donkey pony pig calf sheep horse cow piglet foal bull deer fawn giraffe zebra camel unicorn
            llama yak
            """
        ),
        ("hoof", "hooves"),
    ),
}
SIZES = ("little", "small", "young", "tiny", "big", "old")

# Things by what they can do in need: (name, adjectives, "it ..." or "" for one of the common charms).
THINGS = {
    "light": (
        ("lantern", "brass green round", "it glowed like a small moon"),
        ("candle", "white stout red", "it never seemed to burn down"),
        ("lamp", "copper silver little", "it made every room look warm"),
        ("torch", "yellow trusty", "its beam reached to the end of the road"),
        ("glass ball", "blue bright", "it shone in the dark like a tame star"),
        ("crystal", "clear violet", "it caught the light and kept it"),
        ("star", "paper glass", "it shone whenever the room was dark"),
        ("crown", "golden silver", "it sparkled like morning frost"),
    ),
    "sound": (
        ("bell", "silver brass", "it rang as clear as a blackbird"),
        ("drum", "red tin round", "it boomed like a giant's heart"),
        ("flute", "wooden ivory thin", "its voice was sweet and low"),
        ("whistle", "tin wooden", "you could hear it three fields away"),
        ("trumpet", "golden dented", "it sounded like a sunrise"),
        ("horn", "curved old", "it could wake the hills"),
        ("fiddle", "brown old", "it could laugh and it could weep"),
        ("music box", "painted silver", "it played a tune that nobody could forget"),
        ("guitar", "small yellow", "it hummed even when nobody touched it"),
        ("accordion", "red old", "it breathed like a sleeping cat"),
    ),
    "flag": (
        ("scarf", "red woollen striped", "it was as soft as a cloud"),
        ("kite", "yellow paper blue", "it danced in the wind like a swallow"),
        ("umbrella", "red spotted big", "it was as bright as a poppy"),
        ("blanket", "blue patchwork woollen", "it smelled of home"),
        ("flag", "white blue", "it fluttered in the smallest breeze"),
        ("coat", "yellow warm", "it had seven pockets"),
        ("hat", "red pointed straw", "it could be seen from far away"),
        ("ribbon", "long golden", "it shimmered in the sun"),
        ("cloak", "green velvet", "it swished when one walked"),
        ("feather", "white golden", "it was lighter than a breath"),
        ("balloon", "red big", "it always wanted to fly away"),
        ("quilt", "patchwork warm", "every patch of it told a story"),
        ("book", "old blue thick", "it was full of pictures of faraway lands"),
        ("map", "old yellow", "it showed every path and every hill"),
        ("doll", "wooden rag", "it had the friendliest smile in the world"),
        ("teddy bear", "brown old", "it was a good listener"),
        ("basket", "woven round", "it could hold more than one would think"),
        ("letter", "crumpled blue", "it was from someone far away"),
    ),
    "knock": (
        ("key", "golden rusty iron", "nobody knew which door it opened"),
        ("spoon", "wooden silver", "soup tasted better with it"),
        ("cup", "golden blue tin", "milk tasted sweeter from it"),
        ("teapot", "round blue", "it sang when the water boiled"),
        ("box", "carved wooden", "it had a secret drawer"),
        ("pan", "copper iron", "pancakes never stuck to it"),
        ("hammer", "small heavy", "it had never missed a nail"),
        ("bucket", "tin red", "it had not a single hole"),
        ("shell", "pink pearly", "it held the sound of the sea"),
        ("clock", "little brass", "it ticked like a tiny heart"),
        ("compass", "brass old", "it always knew the way north"),
        ("walking stick", "knotted oak", "it had a face carved into the handle"),
        ("ring", "silver thin", "it glittered like dew"),
        ("mirror", "round silver", "it made everyone look kind"),
        ("stone", "smooth green", "it was always warm"),
        ("coin", "old golden", "it had a ship on one side"),
        ("pencil", "red stubby", "it drew the finest pictures"),
        ("marble", "green glass", "there was a tiny storm inside it"),
        ("sword", "wooden silver", "it had never hurt anyone"),
        ("shield", "painted round", "there was a lion on it"),
        ("spaceship", "tin toy", "it had three round windows"),
        ("boat", "toy wooden", "it had a real sail"),
        ("train", "toy tin", "its wheels went click and clack"),
        ("ball", "red leather", "it bounced as high as a roof"),
        ("wand", "silver crooked", "it sometimes made sparks"),
        ("telescope", "brass long", "it could bring the moon close"),
        ("camera", "old black", "it never took a bad picture"),
        ("bicycle", "blue rusty", "its bell was as loud as a rooster"),
        ("wheelbarrow", "green old", "its wheel squeaked a little song"),
    ),
}
COMMON_CHARMS = (
    "it was old, but it was still beautiful",
    "there was not another one like it",
    "nobody could look at it without smiling",
    "it looked plain, but there was something special about it",
    "it had come a long way, from across the sea",
)
RESCUES = {
    "light": (
        "{h.He} held the {o} up as high as {h.he} could. Its light fell on the path, and from far away came a"
        ' voice: "I see it! I see your {o}!" It was {x}.',
        '{h.He} lifted the {o}, and it shone through the dark. "Here I am!" called {x}, who had seen the light.',
    ),
    "sound": (
        "{h.He} played on the {o} as loudly as {h.he} could. The sound went through wind and dark, and then, "
        "very softly, somebody answered. It was {x}.",
        '{h.He} took the {o} and let it sound, once, twice, three times. "Here! I am here!" called {x}, who '
        "had heard it.",
    ),
    "flag": (
        '{h.He} climbed onto a rock and waved the {o} in the air, as high as {h.he} could. "I can see you!" '
        'cried a voice. "I can see your {o}!" It was {x}.',
        "{h.He} tied the {o} to a long stick and waved it above {h.his} head. And {x}, who was looking for a "
        'sign, saw it. "Over here!" called {x}.',
    ),
    "knock": (
        "{h.He} knocked with the {o} against a hollow tree, again and again. Knock, knock, knock! And from "
        "far away {x} knocked back.",
        '{h.He} struck the {o} against a stone. It rang out through the dark. "I hear you!" called {x}. "I am'
        ' over here!"',
    ),
}
RESCUES_PAST = {
    "light": "The light of the {o} showed {h} the way to {x}.",
    "sound": "The sound of the {o} led {h} to {x}.",
    "flag": "{h} waved the {o}, and {x} saw it from far away.",
    "knock": "{h} knocked with the {o}, and {x} heard it and answered.",
}

# Homes: where that is, what people call it, and spots near it. Those with {name} get a proper name.
HOMES = {
    "village": (
        "in the village of {name}",
        "the village",
        (
            "the old mill",
            "the well",
            "the bakery",
            "the market square",
            "the church",
            "the duck pond",
            "the stone bridge",
            "the big linden tree",
        ),
    ),
    "seaside": (
        "in a village by the sea",
        "the village",
        (
            "the lighthouse",
            "the harbour wall",
            "the fish market",
            "the upturned boat",
            "the sand dunes",
            "the rope maker's hut",
            "the long pier",
        ),
    ),
    "forest": (
        "in the forest of {name}",
        "the forest",
        (
            "the hollow oak",
            "the fallen log",
            "the fern bank",
            "the mossy stone",
            "the little stream",
            "the blackberry bushes",
            "the tall pine",
            "the clearing",
        ),
    ),
    "wood": (
        "at the edge of the old wood",
        "the old wood",
        (
            "the crooked birch",
            "the fox path",
            "the mushroom ring",
            "the hazel bushes",
            "the forgotten well",
            "the wooden gate",
            "the ivy wall",
        ),
    ),
    "valley": (
        "in the valley of {name}",
        "the valley",
        (
            "the waterfall",
            "the shepherd's hut",
            "the round hill",
            "the apple orchard",
            "the winding road",
            "the old barn",
            "the wheat field",
        ),
    ),
    "town": (
        "in the town of {name}",
        "the town",
        (
            "the clock tower",
            "the fountain",
            "the school",
            "the baker's shop",
            "the park gate",
            "the tram stop",
            "the library",
            "the bridge with the lions",
        ),
    ),
    "farm": (
        "on a farm near {name}",
        "the farm",
        (
            "the hay barn",
            "the pigsty",
            "the vegetable patch",
            "the pear tree",
            "the milk shed",
            "the stone wall",
            "the corn field",
        ),
    ),
    "mountain": (
        "at the foot of the mountain {name}",
        "the mountain",
        (
            "the goat path",
            "the blue lake",
            "the old cable hut",
            "the split rock",
            "the larch wood",
            "the snow field",
            "the wooden cross",
        ),
    ),
    "river": (
        "beside the river {name}",
        "the river",
        (
            "the ferry landing",
            "the reeds",
            "the willow tree",
            "the water mill",
            "the sandbank",
            "the fisherman's hut",
            "the rapids",
        ),
    ),
    "island": (
        "on the island of {name}",
        "the island",
        (
            "the palm tree",
            "the white beach",
            "the wrecked ship",
            "the tall cliff",
            "the lagoon",
            "the bamboo hut",
            "the tide pool",
        ),
    ),
    "castle": (
        "in the castle of {name}",
        "the castle",
        (
            "the highest tower",
            "the rose garden",
            "the stables",
            "the drawbridge",
            "the kitchen",
            "the long gallery",
            "the moat",
        ),
    ),
    "meadow": (
        "in a meadow full of clover",
        "the meadow",
        (
            "the big molehill",
            "the poppy patch",
            "the dry ditch",
            "the lonely elm",
            "the beehives",
            "the garden fence",
            "the puddle",
        ),
    ),
}
HOME_NAMES = words(
    """
    Millbrook Alderby Greenholm Ashford Larkfield Windham Marlow Oakhill Brindle Fernley Tarn Elverton Stillwater
    Harrow Juniper Rosedale Kettleby Sandor Umber Velden Quill Northwick Pebbleton Dunmore Hollin Appleton
    """
)
LANDS = ("Aldermoor", "Farawell", "Tumbledown", "Silverfall", "Onderland", "Karamoor")
SEASONS = ("spring", "summer", "autumn", "winter")
