"""WebShop's reward (arXiv 2207.01206, section 3.1, and its published code).

    R = r_type · (attributes matched + options matched + [price ≤ cap])
              / (attributes + options + 1)            counts of the goal

Strings match where rapidfuzz's token_set_ratio is above 85, which is what the original computes
through thefuzz. One thing differs: the original takes nouns of titles from spaCy's large English
model; here they are all words but stop words and numbers, or what a function of your own returns.
On the four title pairs of the original's tests spaCy says .333, .30, .15 and less than .05; this
says .400, .278, .143 and 0, which leads to the same `r_type` each time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from w2sjax.envs.webshop_catalogue import Goal, Product
from w2sjax.envs.webshop_search import missing_package, tokens

Nouns = Callable[[str], list[str]]

_MATCH = 85  # a ratio above this is a match
_NUMBER = re.compile(r"[\d.]+")
# The names that colours are mapped to, in this order: COLOR_SET of the original's code.
_COLOR_NAMES = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower "
    "tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
)
COLORS = tuple(_COLOR_NAMES.split())


class Reward(NamedTuple):
    """The reward and what it is made of."""

    total: float
    type_factor: float
    attributes: int  # how many of the goal's were matched
    options: int
    price: bool


def title_words(title: str) -> list[str]:
    """The words that stand in for a title's nouns."""
    return [word for word in tokens(title) if not _NUMBER.fullmatch(word)]


def score_purchase(
    product: Product, chosen: Collection[str], goal: Goal, nouns: Nouns = title_words
) -> Reward:
    """The reward for buying a product with some option values.

    Args:
      product: what was bought.
      chosen: the values chosen of its options.
      goal: what was wanted.
      nouns: a title → its nouns, in lower case, repetitions included.

    >>> from w2sjax.envs.webshop_catalogue import Goal, Product
    >>> tea = Product("T1", "Green Tea", "", (), {}, ("organic",), "tea", "a › b", 9.0, "$9.0")
    >>> goal = Goal("T1", "Find tea", ("organic", "decaf"), (), 20.0, "tea", tea.title, "a › b")
    >>> score_purchase(tea, [], goal).total
    0.6666666666666666
    """
    attributes = match_attributes(product, goal.attributes)
    options = match_options(chosen, goal.options)
    price = product.price <= goal.price_cap
    factor = type_factor(product, goal, nouns)
    wanted = len(goal.attributes) + len(goal.options) + 1
    return Reward(
        (attributes + options + price) / wanted * factor, factor, attributes, options, price
    )


def title_score(title: str, goal_title: str, nouns: Nouns = title_words) -> float:
    """The share of the goal title's nouns that the title has; 0.2 where it has none."""
    wanted = nouns(goal_title)
    return len(set(nouns(title)) & set(wanted)) / len(wanted) if wanted else 0.2


def type_factor(product: Product, goal: Goal, nouns: Nouns = title_words) -> float:
    """How much the product is of the kind that was wanted: 1, 0.5, 0.1 or 0."""
    score = title_score(product.title, goal.title, nouns)
    if score == 0:
        return 0.0
    if score < 0.1:
        return 0.1
    common = _categories(product.product_category) & _categories(goal.product_category)
    same = product.query == goal.query or len(common) >= 2 or score > 0.2
    return 1.0 if same else 0.5


def match_attributes(product: Product, wanted: Iterable[str]) -> int:
    """How many attributes the product has, by its own list or by its texts."""
    texts = (
        product.title.lower(),
        " ".join(product.bullets).lower(),
        product.description.lower(),
    )
    return sum(
        any(similar(own, attribute) for own in product.attributes)
        or any(attribute in text for text in texts)
        for attribute in wanted
    )


def match_options(chosen: Iterable[str], wanted: Iterable[str | tuple[str, str]]) -> int:
    """How many wanted options are among the chosen values."""
    values = [simple_color(value) for value in chosen]
    return sum(
        any(similar(value, option) for value in values) for option in map(simple_color, wanted)
    )


def simple_color(option: str | tuple[str, str]) -> str:
    """The first of `COLORS` in a text, else the text.

    A pair of name and value is a colour only where one of the two is just that; else both count.
    """
    found = next((color for color in COLORS if color in option), None)
    if found is not None:
        return found
    return option if isinstance(option, str) else " ".join(option)


def check_packages() -> None:
    """Raises ImportError where rapidfuzz is missing."""
    _rapidfuzz()


def similar(one: str, other: str) -> bool:
    """Whether two texts match, by the words that they have in common."""
    ratio, process = _rapidfuzz()
    return round(ratio(process(_ascii(one)), process(_ascii(other)))) > _MATCH


def _ascii(text: str) -> str:
    return text if text.isascii() else text.encode("ascii", "ignore").decode()


def _categories(path: str) -> set[str]:
    return {part.strip() for part in path.split("›")}


@functools.cache
def _rapidfuzz() -> tuple[Callable[[str, str], float], Callable[[str], str]]:
    try:
        from rapidfuzz import fuzz, utils
    except ImportError as error:
        raise ImportError(missing_package("rapidfuzz")) from error
    return fuzz.token_set_ratio, utils.default_process
