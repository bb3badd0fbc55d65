"""The small world of the word problems: people, things, places, and facts beside the point.

Every noun here has a regular plural, so `plural` is all the grammar the templates need.
"""

WOMEN = tuple(
    (
        "Mia Anna Lena Sara Emma Olivia Nora Lucy Grace Ella Ruth Maya Zoe Clara Ivy Hana "
        "Amina Priya Rosa Julia Alice"
    ).split()
)
MEN = tuple(
    (
        "Tom Ben Leo Sam Max Omar Paul Noah Jack Luke Hugo Ravi Liam Adam Finn Kenji Diego "
        "Peter David Henry Oscar"
    ).split()
)

FRUITS = tuple(
    ("apple pear peach plum orange lemon cherry strawberry carrot radish apricot melon").split()
)
TREATS = tuple("cookie muffin cracker pancake waffle pretzel pie roll".split())
GOODS = tuple(
    (
        "pencil pen book marble sticker stamp shell button card coin balloon toy ball crayon "
        "bead ribbon postcard badge feather ticket magnet notebook eraser brush puzzle kite"
    ).split()
)
FLOWERS = tuple("rose tulip daisy lily sunflower poppy orchid pansy".split())
ANIMALS = tuple("chicken duck goat cow rabbit pony horse pig hen turkey".split())

NOUNS = {
    "thing": FRUITS + TREATS + GOODS,
    "food": FRUITS + TREATS,
    "fruit": FRUITS,
    "treat": TREATS,
    "good": GOODS,
    "flower": FLOWERS,
    "animal": ANIMALS,
    "box": tuple("box bag basket crate bucket sack carton packet case tray".split()),
    "friend": tuple("friend cousin classmate neighbor teammate".split()),
}

PLACES = {
    "shop": (
        "the market",
        "the shop",
        "the corner store",
        "the fair",
        "the village store",
        "the mall",
        "the school sale",
    ),
    "place": (
        "the park",
        "the library",
        "the school",
        "the beach",
        "the museum",
        "the garden",
        "the lake",
        "the station",
        "the farm",
        "the town hall",
    ),
}

# Facts that have nothing to do with the question: {d} is the number to be ignored.
PERSON_ASIDES = (
    "{A} is {d} years old.",
    "{A} lives {d} miles from {place}.",
    "{A} has {d} teachers at school.",
    "{A} walked {d} minutes to {place} this morning.",
    "{A} gets up at {d} o'clock every day.",
    "{A}'s house has {d} windows.",
    "{A} has {d} pairs of shoes.",
)
GENERAL_ASIDES = (
    "It is {d} degrees outside.",
    "There are {d} trees near {place}.",
    "The next bus comes in {d} minutes.",
    "There are {d} chairs in the room.",
    "The door has the number {d}.",
)


def plural(noun: str) -> str:
    """The regular English plural: apples, boxes, cherries, toys."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
