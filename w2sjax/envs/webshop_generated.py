"""A generated catalogue and its goals: functions of a seed, the same in every process.

Products come in families: one brand's line of a kind of thing, whose members share all attributes
but one, and differ in price and in the colours and sizes on offer. Titles show two of a product's
three attributes, the page "features" shows all. A goal names two attributes, one or two option
values and a price cap, so a purchase is easily right in part. Every product
belongs to one split, by a hash, and is the model of that split's goals only; the catalogue that is
searched is the same for all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from w2sjax.envs.webshop_catalogue import (
    SPLITS,
    Goal,
    Product,
    Shop,
    check_split,
    stable_hash,
)
from w2sjax.envs.webshop_search import SearchIndex, build_index

_Item = TypeVar("_Item")


class Kind(NamedTuple):
    """One kind of thing: what it can be like."""

    category: str
    attributes: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]


_COLORS = ("red", "blue", "green", "black", "white", "brown", "gray", "pink")
_SIZES = ("small", "medium", "large", "extra wide")
# Two kinds share at most one attribute, so that no thing of another kind fulfils a goal of two.
KINDS: Mapping[str, Kind] = {
    "shirt": Kind(
        "Clothing › Men › Shirts",
        ("slim fit", "long sleeve", "pure cotton", "quick dry", "button down", "wrinkle free"),
        {"color": _COLORS, "size": _SIZES},
    ),
    "dress": Kind(
        "Clothing › Women › Dresses",
        ("long sleeve", "silk blend", "high waist", "floral print", "deep pockets", "machine wash"),
        {"color": _COLORS, "size": _SIZES},
    ),
    "boots": Kind(
        "Shoes › Men › Boots",
        ("steel toe", "rubber sole", "real leather", "water proof", "wide toe", "warm lining"),
        {"color": _COLORS, "size": ("eight", "nine", "ten", "eleven")},
    ),
    "sneakers": Kind(
        "Shoes › Women › Sneakers",
        ("memory foam", "rubber sole", "lace up", "arch support", "vegan", "low weight"),
        {"color": _COLORS, "size": ("five", "six", "seven", "eight")},
    ),
    "lamp": Kind(
        "Home › Bedroom › Lighting",
        ("touch control", "usb port", "glass shade", "long cord", "battery powered", "dimmable"),
        {"color": _COLORS, "style": ("desk", "floor", "clip", "wall")},
    ),
    "pillow": Kind(
        "Home › Bedroom › Bedding",
        (
            "memory foam",
            "pure cotton",
            "machine wash",
            "cooling gel",
            "side sleeper",
            "duck feather",
        ),
        {"color": _COLORS, "size": ("queen", "king", "travel", "body")},
    ),
    "tea": Kind(
        "Grocery › Drinks › Tea",
        ("organic", "caffeine free", "fair trade", "loose leaf", "low sugar", "herbal"),
        {"flavor": ("ginger", "honey", "berry", "jasmine"), "box": ("ten bags", "fifty", "tin")},
    ),
    "shampoo": Kind(
        "Beauty › Bath › Hair",
        ("sulfate free", "tea tree", "organic", "dry scalp", "cruelty safe", "curly hair"),
        {"scent": ("honey", "berry", "citrus", "none"), "size": ("travel", "family", "salon")},
    ),
}
_BRANDS = ("Acme", "Borel", "Corvo", "Delta", "Enzo", "Fjord", "Gusto", "Halo", "Indra", "Juno")
_FAMILY_SIZE = 4
_HIDDEN_RATE = 0.2  # how often a goal names an attribute that no title shows
_CHEAPEST, _DEAREST = 5, 95
_SPLIT_SHARES = (8, 2, 4, 3, 3)  # of products, in the order of `SPLITS`
MAX_PRODUCTS = 8000


def make_shop(num_products: int, seed: int) -> Shop:
    """Draws a catalogue; a few hundred products take a tenth of a second.

    Args:
      num_products: how many, spread evenly over `KINDS`.
      seed: of the catalogue, and so of the goals.

    Raises:
      ValueError: too few products for every split to have one.
    """
    products = _draw_products(num_products, seed)
    index = SearchIndex(build_index(product.search_text() for product in products))
    tasks = GeneratedTasks(products, seed)
    counts = {"products": len(products)}
    return Shop(products, [product.asin for product in products], index, tasks, counts)


class GeneratedTasks:
    """Endless tasks "webshop/<split>/<index>", each drawn from its id and the catalogue's seed."""

    def __init__(self, products: Sequence[Product], seed: int):
        self._seed = seed
        shares = [
            split for split, share in zip(SPLITS, _SPLIT_SHARES, strict=True) for _ in range(share)
        ]
        self._models: dict[str, list[Product]] = {split: [] for split in SPLITS}
        for product in products:
            drawn = stable_hash(f"webshop split {seed} {product.asin}") % len(shares)
            self._models[shares[drawn]].append(product)
        empty = [split for split in SPLITS if not self._models[split]]
        if empty:
            raise ValueError(
                f"env.options.num_products: {len(products)} products are too few: with seed {seed} "
                f"no goal is made from any in {', '.join(empty)}; take 100 or more"
            )

    def task_ids(self, split: str, count: int | None) -> list[str]:
        check_split(split)
        if count is None or count < 0:
            raise ValueError(
                f"env.webshop: split {split!r} of the generated catalogue is endless: give a count "
                f"of 0 or more, got {count}"
            )
        return [f"webshop/{split}/{index}" for index in range(count)]

    def goal(self, task_id: str) -> Goal:
        name, _, rest = task_id.partition("/")
        split, _, index = rest.partition("/")
        if name != "webshop" or not (index.isascii() and index.isdigit()) or len(index) > 18:
            raise ValueError(
                f"env.webshop: {task_id[:200]!r} is no task id of the generated catalogue; they "
                "read webshop/<split>/<index>"
            )
        check_split(split)
        rng = random.Random(stable_hash(f"webshop goal {self._seed} {split} {int(index)}"))
        product = _choose(rng, self._models[split])
        attributes = list(product.attributes[:2])  # those in its title
        if rng.random() < _HIDDEN_RATE:
            attributes[int(rng.random() * 2)] = product.attributes[2]
        names = _sample(rng, tuple(product.options), 1 + (rng.random() < 0.6))
        options = {name: _choose(rng, product.options[name]) for name in sorted(names)}
        said = ", and ".join(f"{name}: {value}" for name, value in options.items())
        instruction = f"Find {attributes[0]} and {attributes[1]} {product.query} with {said}"
        return Goal.of(product, instruction, attributes, tuple(options.values()), rng)


def _draw_products(num_products: int, seed: int) -> list[Product]:
    rng = random.Random(stable_hash(f"webshop catalogue {seed}"))
    drawn: list[tuple[str, str, tuple[str, ...], dict[str, tuple[str, ...]], float]] = []
    per_kind = [num_products // len(KINDS)] * len(KINDS)
    for extra in range(num_products % len(KINDS)):
        per_kind[extra] += 1
    for (noun, kind), count in zip(KINDS.items(), per_kind, strict=True):
        prices = _prices(rng, count)
        for number in range(count):
            if number % _FAMILY_SIZE == 0:
                brand = _choose(rng, _BRANDS)
                line = _sample(rng, kind.attributes, 3)
            own = list(line)
            own[int(rng.random() * 3)] = _choose(rng, [a for a in kind.attributes if a not in line])
            options = {}
            for name, values in kind.options.items():
                offered = _sample(rng, values, 3)
                options[name] = tuple(value for value in values if value in offered)
            drawn.append((noun, brand, tuple(own), options, prices[number]))
    order = _sample(rng, range(len(drawn)), len(drawn))
    width = len(str(len(drawn)))
    return [_product(f"P{row:0{width}d}", *drawn[place]) for row, place in enumerate(order)]


def _product(
    asin: str,
    noun: str,
    brand: str,
    attributes: tuple[str, ...],
    options: Mapping[str, tuple[str, ...]],
    price: float,
) -> Product:
    kind = KINDS[noun]
    return Product(
        asin=asin,
        title=f"{brand} {attributes[0]} {attributes[1]} {noun}",
        description=f"A {noun} by {brand}.",
        bullets=(f"This {noun} is {', '.join(attributes)}.",),
        options=options,
        attributes=attributes,
        query=noun,
        product_category=kind.category,
        price=price,
        price_tag=f"${price:g}",
    )


def _prices(rng: random.Random, count: int) -> list[float]:
    """Different prices of the products of a kind, in steps as coarse as their number allows."""
    step = 1.0
    while (_DEAREST - _CHEAPEST) / step < count:
        step /= 10
    places = _sample(rng, range(int((_DEAREST - _CHEAPEST) / step)), count)
    return [round(_CHEAPEST + place * step, 2) for place in places]


# rng.random() is the one draw whose sequence Python promises to keep between versions.


def _choose(rng: random.Random, options: Sequence[_Item]) -> _Item:
    return options[int(rng.random() * len(options))]


def _sample(rng: random.Random, options: Sequence[_Item], count: int) -> list[_Item]:
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
