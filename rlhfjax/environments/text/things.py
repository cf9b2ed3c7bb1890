"""What twenty questions is played about: things with attributes that are true or false of them."""

from typing import NamedTuple

import numpy as np


class Things(NamedTuple):
    """N things, M attributes, in the words of the question "Is it ...?"."""

    names: tuple[str, ...]  # e.g. "a cat"
    attributes: tuple[str, ...]  # e.g. "alive"
    true_NM: np.ndarray  # bool [N, M]


ATTRIBUTES = {
    "alive": "alive",
    "animal": "an animal",
    "fur": "covered with fur",
    "flies": "able to fly",
    "swims": "at home in the water",
    "legs": "on four legs",
    "food": "good to eat",
    "sweet": "sweet",
    "house": "found in most houses",
    "big": "bigger than a person",
    "pocket": "small enough for a pocket",
    "metal": "made mostly of metal",
    "wood": "made mostly of wood",
    "wheels": "on wheels",
    "travel": "something to travel with",
    "electric": "run on electricity",
    "music": "used to make music",
    "sharp": "sharp",
    "round": "round",
    "soft": "soft",
}

THINGS = {
    "a cat": "alive animal fur legs house soft",
    "a dog": "alive animal fur legs swims house soft",
    "a horse": "alive animal fur legs big travel",
    "a mouse": "alive animal fur legs pocket soft",
    "an elephant": "alive animal legs big",
    "a camel": "alive animal fur legs big travel soft",
    "a hedgehog": "alive animal legs sharp round",
    "a frog": "alive animal legs swims pocket",
    "a crocodile": "alive animal legs swims big sharp",
    "a whale": "alive animal swims big",
    "a shark": "alive animal swims big sharp",
    "a trout": "alive animal swims food",
    "a duck": "alive animal flies swims food soft",
    "an eagle": "alive animal flies sharp",
    "a bee": "alive animal flies pocket sharp",
    "a butterfly": "alive animal flies pocket soft",
    "an oak": "alive big wood",
    "a cactus": "alive sharp house",
    "a rose": "alive sharp soft",
    "moss": "alive soft",
    "an apple": "food sweet house pocket round",
    "a cake": "food sweet house round soft",
    "honey": "food sweet house soft",
    "bread": "food house soft",
    "a carrot": "food house",
    "an egg": "food house pocket round",
    "a pea": "food pocket round",
    "a car": "metal wheels travel big",
    "a bicycle": "metal wheels travel",
    "a tram": "metal wheels travel electric big",
    "an airplane": "flies metal wheels travel big",
    "a canoe": "swims wood travel big",
    "a ship": "swims metal travel big",
    "a knife": "metal sharp house",
    "a needle": "metal sharp house pocket",
    "a coin": "metal house pocket round",
    "a key": "metal house pocket",
    "an axe": "metal sharp",
    "a pencil": "wood sharp house pocket",
    "a table": "wood legs house",
    "a match": "wood house pocket",
    "a drum": "wood music round",
    "a piano": "wood music big",
    "a violin": "wood music",
    "a trumpet": "metal music",
    "an electric organ": "electric music big",
    "a lamp": "electric house",
    "a telephone": "electric house pocket",
    "a washing machine": "electric metal house",
    "a pillow": "house soft",
    "a ball": "house round",
    "a marble": "house pocket round",
}

_PAIRS = (
    ("big", "small"),
    ("red", "blue"),
    ("round", "square"),
    ("soft", "hard"),
    ("old", "new"),
    ("wet", "dry"),
)


def everyday_things(count: int | None = None) -> Things:
    """Things of every day and twenty attributes of them, by a table written for this game; no two are alike.

    count: of the things, evenly spaced through the list; None: all. ValueError where there are not so many.
    """
    names = tuple(THINGS)
    if count is not None:
        if not 1 <= count <= len(names):
            raise ValueError(f"count={count} must lie between 1 and {len(names)}, the things of the table")
        names = tuple(names[i * len(names) // count] for i in range(count))
    true_NM = [[attribute in THINGS[name].split() for attribute in ATTRIBUTES] for name in names]
    return Things(names, tuple(ATTRIBUTES.values()), np.array(true_NM))


def every_box(attributes: int) -> Things:
    """All 2^attributes boxes that are big or small, red or blue, round or square, and so on: a complete table."""
    if not 1 <= attributes <= len(_PAIRS):
        raise ValueError(f"attributes={attributes} must lie between 1 and {len(_PAIRS)}")
    number_N = np.arange(2**attributes)
    true_NM = (number_N[:, None] >> np.arange(attributes)[None, :]) & 1 == 0
    pairs = _PAIRS[:attributes]
    names = [" ".join(pair[int(not x)] for pair, x in zip(pairs, row, strict=True)) for row in true_NM]
    return Things(tuple(f"the {name} box" for name in names), tuple(pair[0] for pair in pairs), true_NM)


def check_things(things: Things) -> np.ndarray:
    """`true_NM` as NumPy. ValueError for a table of the wrong shape, and for things that no attribute tells apart."""
    true_NM = np.asarray(things.true_NM)
    shape = (len(things.names), len(things.attributes))
    if true_NM.shape != shape or true_NM.dtype != bool or 0 in shape:
        raise ValueError(f"true_NM must be bool {list(shape)}, got {true_NM.dtype.name}{list(true_NM.shape)}")
    _, first_N, number_N = np.unique(true_NM, axis=0, return_index=True, return_inverse=True)
    first_N = first_N[number_N.reshape(-1)]
    alike = np.flatnonzero(first_N != np.arange(len(true_NM)))
    if alike.size:
        one, other = things.names[first_N[alike[0]]], things.names[alike[0]]
        raise ValueError(f"no attribute tells {other} from {one}")
    return true_NM
