"""Words for the RULER-style tasks, and how distinct ones are drawn. No list holds a word twice or one of `tasks.words`'
prose; parts of names have fixed lengths, so that of two different names neither is inside the other."""

import uuid
from collections.abc import Callable, Sequence

import numpy as np

from recycled_jax.tasks.words import ADJECTIVES as COMMON_ADJECTIVES
from recycled_jax.tasks.words import KEYS, PEOPLE

# A paragraph that says nothing, in words so short that a text can be cut to a length at any of them.
NOISE = "The sun is up. The sea is calm. We row out and we row back. All is as it was. Then we sit and eat."

NOUNS = (
    *KEYS,
    *"""
    acorn aisle album alley almond alpaca ankle apron arcade armor ash asphalt attic aunt axle bakery ballad balloon
    banner barley basin bat bean beard bee beetle belt bench berry bicycle birch biscuit blouse bone boot border bow
    bowl bracelet brick broom brush bulb bus cab cage cake calendar candy cape card cart cat cave ceiling chapel
    charcoal cheese chest chin chorus clay cliff cloak cloth cloud coach collar comb cord cork corn couch cow crab
    crayon crib crow cube cuff curtain cushion deer deck desk diary dice ditch dog doll dove drawer duck dune dust
    eel egg elbow elk elm fan fern ferry fig finch flag flask flea fleece flock flour foam fog folder fork frame
    frog fur gem ghost gold gong grain grass gull gum hay hedge hen hinge hive hoof hook hose ink insect iron jam
    jar jaw jug juice kelp kite knot lace lamb lane lark lawn leaf leather ledge lever lid lily lime lip log loom
    lung marsh mast mat maze meal milk mint mole moon moss moth mouse mouth mud mug mule mushroom nail neck nest net
    nose notebook nut oat oil ostrich oven owl ox pan parcel parsley path paw pea pear peg pen pencil penguin petal
    pig pipe pit plank plow pod pole pond porch potato powder prune pump purse rack raft rail rain rake ramp rat
    reed reef rhubarb rib rice rod roof root rug rust sack sail salad salt sand sauce scale seal seed shawl sheep
    shelf shell shield shirt shovel shrimp sink skirt slate sled slipper sloth smoke snail snake snow soap sock sofa
    soup spade spear sponge spoon stair stamp steam stem stick stool stove straw stream string sugar suit swamp
    syrup tail tent thorn thread throat thumb tile tin toad toast tomb tooth towel toy tractor trail train tray
    trout truck trunk tub turnip tusk twig vase vest vine wallet wasp wave wax web weed whale wheat whip wig wing
    wire wolf wood wool worm wrist yarn yolk zipper
    """.split(),
)
ADJECTIVES = (
    *COMMON_ADJECTIVES,
    *"""
    able active aged agile alert ample ancient angry awake bare basic blank bleak blind blunt bold brave brief brisk
    brown busy careful cheap cheerful chief civil clear clever close cloudy clumsy common cool costly cozy crisp
    crooked cruel curious curly daily damp dear deep dense dizzy double dull dusty eager earnest easy elder elegant
    equal exact extra faint fair faithful false famous fancy fast feeble fierce final firm flat fluffy formal
    fragile free fresh friendly frosty full funny gentle giant glad gloomy golden graceful grand grim happy harsh
    hasty hidden hollow honest humble hungry idle inner jolly keen kind lame lazy lively local lonely loose loud
    loyal lucky mad mellow merry mild modest moist neat nimble noble noisy odd outer pale patient perfect pink
    polite pretty proud pure purple quick rapid rare raw ready rough royal rude rural sad safe salty secret sharp
    shiny short shy silent simple sleek slim slow smart smooth solid sour spare steady steep sticky stiff still
    strict sturdy sudden sunny sweet swift tall tame tender thick thirsty tidy tight timid tiny tired tough true
    ugly upper urban vague vast vivid weak wealthy weary wet wise witty wooden worthy
    """.split(),
)

FIRST_NAMES = (
    *PEOPLE,
    *"""
    Agnes Albert Anna Arthur Beatrice Charles Dora Edwin Ellen Ernest Esther Florence George Harold Helen Hugo Ida Jacob
    Julia Leo Lydia Martin Nora Oscar Paula Philip Ruth Samuel Sophie Victor
    """.split(),
)
_SURNAME_STARTS = """
    Abe Alt Bar Ben Bol Cal Cor Dal Den Dor Eck Els Far Fel Gar Gil Hal Hor Ing Jan Kel Kor Lan Lem Mar Mel Nor Orm Pel
    Ran Ros Sal Sel Tam Tor Ull Van Wal Wen Zan
    """.split()
_SURNAME_ENDS = """
    bach berg blom born dahl dorf feld gren hart heim horn hult kamp land lind lund mann mark meer moen nack nard quin
    rath rick rood sand sell sett skog stad thal toft vall vang vick vold wald witz zell
    """.split()
_TOWN_STARTS = """
    Ashl Barr Bram Cald Carn Dorn Drov Elst Fenn Garn Gart Hald Harl Hest Inch Jarl Kest Kirl Lorn Lund Marl Mest
    Norb Oakh Ostr Pell Penn Rand Rusk Selt Stav Tarn Torv Ulst Vald Wend Wolv Yarr Zeld
    """.split()
_TOWN_MIDDLES = "ab ac ag al am an ar el em en er il im in ir ol om on or ul um ur".split()
_TOWN_ENDS = "bury cote dale fell ford gate hall holm land mere moor pool port wick wold".split()

# Without vowels a code is neither a word nor inside one.
_CODE_LETTERS = tuple("bcdfghjklmnpqrstvwxz")


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def pair(rng: np.random.Generator) -> str:
    """An adjective and a noun, joined by a hyphen."""
    return f"{pick(rng, ADJECTIVES)}-{pick(rng, NOUNS)}"


PAIRS = len(ADJECTIVES) * len(NOUNS)


def random_uuid(rng: np.random.Generator) -> str:
    """Of version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def code(rng: np.random.Generator, letters: int) -> str:
    """Random lower-case consonants."""
    return "".join(pick(rng, _CODE_LETTERS) for _ in range(letters))


def surname(rng: np.random.Generator) -> str:
    """Seven letters."""
    return pick(rng, _SURNAME_STARTS) + pick(rng, _SURNAME_ENDS)


def town(rng: np.random.Generator) -> str:
    """Ten letters: longer than any other word of a name, so never inside one."""
    return pick(rng, _TOWN_STARTS) + pick(rng, _TOWN_MIDDLES) + pick(rng, _TOWN_ENDS)


TOWNS = len(_TOWN_STARTS) * len(_TOWN_MIDDLES) * len(_TOWN_ENDS)


def fresh(draw: Callable[[], str], taken: set[str], *, free: Callable[[str], bool] = lambda _: True) -> str:
    """A string of `draw` that is `free` and not taken, which it then is. Raises ValueError when none is left."""
    for _ in range(100_000):
        if (word := draw()) not in taken and free(word):
            taken.add(word)
            return word
    raise ValueError(f"no word or number like {draw()!r} is left; ask for fewer, longer numbers or another haystack")


def distinct(draw: Callable[[], str], count: int, *, free: Callable[[str], bool] = lambda _: True) -> list[str]:
    """`count` different ones, as `fresh`."""
    taken: set[str] = set()
    return [fresh(draw, taken, free=free) for _ in range(count)]


def check_digits(digits: int, *, count: int = 1) -> None:
    """Raises ValueError when there are fewer than twice `count` numbers of so many digits, or they are too big."""
    if not (1 <= digits <= 18 and 9 * 10 ** (digits - 1) >= 2 * count):
        raise ValueError(f"digits={digits} must be between 1 and 18 and allow for {count} different numbers")


def distinct_numbers(rng: np.random.Generator, count: int, digits: int, *, avoid: str = "") -> list[str]:
    """`count` numbers of `digits` digits, none of which begins with 0, occurs twice or is found in `avoid`."""
    found: dict[str, None] = {}
    while len(found) < count:
        value = str(rng.integers(10 ** (digits - 1), 10**digits))
        if value not in avoid:
            found[value] = None
    return list(found)
