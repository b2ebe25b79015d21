"""What WebShop's expert is after, and searches that make sense for a goal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from w2sjax.envs.webshop_catalogue import Goal, Product, Shop
from w2sjax.envs.webshop_rewards import match_options
from w2sjax.envs.webshop_search import tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to buy what a goal wants."""

    query: str  # a search that finds the product
    row: int | None  # the product's; None where nothing was found at all
    options: Mapping[str, str]  # name → value to choose


def search_queries(goal: Goal) -> list[str]:
    """Searches made of the goal's own words, from the most to the least precise.

    Its attributes with the kind of product, the words of the instruction before the price, the kind
    with each attribute, the kind alone.
    """
    said = goal.instruction.partition(", and price lower than")[0]
    queries = [
        " ".join((*goal.attributes, goal.query)),
        " ".join(tokens(said)),
        *(f"{attribute} {goal.query}" for attribute in goal.attributes),
        goal.query,
    ]
    return [_searchable(query) for query in queries]


def make_plan(shop: Shop, goal: Goal) -> Plan:
    """The first search that finds the goal's product; else its best hit in its place."""
    queries = [*search_queries(goal), _searchable(goal.title)]
    spare: Plan | None = None
    for query in queries:
        hits = shop.search(query)
        row = next((row for row in hits if shop.asins[row] == goal.asin), None)
        if row is not None:
            return Plan(query, row, _wanted_options(shop.products[row], goal))
        if hits and spare is None:
            spare = Plan(query, hits[0], _wanted_options(shop.products[hits[0]], goal))
    return spare or Plan(queries[0] or "?", None, {})


def option_values(product: Product) -> dict[str, tuple[str, str]]:
    """Value → (option name, value); of names that share a value, the last one, as published."""
    return {
        value: (name, value)
        for name, values in product.options.items()
        for value in values
        if value
    }


def _wanted_options(product: Product, goal: Goal) -> dict[str, str]:
    """For each option of the goal the value to click: the same if possible, or one that counts."""
    on_page = option_values(product).values()
    chosen: dict[str, str] = {}
    for option in goal.options:
        exact = [pair for pair in on_page if option in (pair, pair[1])]
        similar = [pair for pair in on_page if match_options([pair[1]], [option])]
        for name, value in exact + similar:
            if chosen.setdefault(name, value) == value:
                break
    return chosen


def _searchable(text: str) -> str:
    """A text that can stand between the brackets of an action."""
    return " ".join(text.lower().replace("[", " ").replace("]", " ").split())
