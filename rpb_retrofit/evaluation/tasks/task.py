"""What one item asks, in words: the kinds differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Task:
    """A context, a question about it, and its only answer.

    The context holds ``needles``: pairs of a depth (0: before all else, 1: after it) and a text; of equal depth, the
    first comes first. Around them lies ``padding``, pieces of text without end, or the user's own text where that is
    None. ``opening`` begins the reply and ends without a space; ``answer`` is what follows it to the letter.
    """

    introduction: str
    needles: list[tuple[float, str]]
    padding: Iterator[str] | None
    question: str
    opening: str
    answer: str


MANY = 4
"""Keys, values and variables of a kind that has several, as in RULER's defaults."""


def numbers(random: Random, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(number) for number in random.sample(range(10_000, 100_000), count)]


def words(random: Random, count: int) -> list[str]:
    """Different words, `len(WORDS)` at most."""
    return random.sample(WORDS, count)


def spread(random: Random, texts: list[str]) -> list[tuple[float, str]]:
    """Needles in this order, anywhere in the context."""
    return list(zip(sorted(random.random() for _ in texts), texts, strict=True))


def listed(things: list[str]) -> str:
    """``a, b, and c``: what models write, told to leave out the "and" or not."""
    return f"{', '.join(things[:-1])}, and {things[-1]}"


# fmt: off
WORDS = [
    "acorn", "anchor", "apple", "arrow", "badger", "banjo", "barley", "basin", "basket", "beacon", "beetle", "bell",
    "birch", "blanket", "bottle", "bramble", "bridge", "bronze", "bucket", "butter", "button", "cabin", "camel",
    "candle", "canoe", "canyon", "carpet", "castle", "cedar", "cherry", "chimney", "cider", "circus", "clay", "clover",
    "cobalt", "comet", "copper", "coral", "cotton", "cradle", "crane", "cricket", "crystal", "curtain", "dagger",
    "daisy", "desert", "diamond", "dolphin", "donkey", "dragon", "drum", "eagle", "ember", "falcon", "feather",
    "fiddle", "finch", "flint", "forest", "fossil", "fountain", "fox", "garden", "garlic", "ginger", "glacier",
    "goblet", "granite", "guitar", "hammer", "harbor", "hazel", "hedge", "helmet", "heron", "honey", "horizon",
    "hornet", "iceberg", "island", "ivory", "jacket", "jasmine", "jungle", "kettle", "kitten", "ladder", "lagoon",
    "lantern", "lemon", "lily", "lizard", "lobster", "magnet", "maple", "marble", "meadow", "melon", "mirror",
    "monkey", "mountain", "mustard", "napkin", "nectar", "needle", "nutmeg", "oak", "oasis", "olive", "onion",
    "orchard", "otter", "oyster", "paddle", "panther", "parrot", "peach", "pebble", "pepper", "piano", "pigeon",
    "pillow", "pine", "planet", "plum", "pocket", "pony", "poppy", "potato", "puddle", "pumpkin", "quilt", "rabbit",
    "raven", "ribbon", "river", "robin", "rocket", "saddle", "salmon", "sandal", "sapphire", "shadow", "shovel",
    "silver", "spider", "spoon", "squirrel", "statue", "sugar", "sunset", "swan", "table", "temple", "thistle",
    "thunder", "tiger", "tomato", "trumpet", "tulip", "turtle", "valley", "velvet", "violin", "walnut", "whistle",
    "willow", "window", "winter", "wizard", "wolf", "zebra",
]
# fmt: on
"""Common English nouns: short in most vocabularies."""
