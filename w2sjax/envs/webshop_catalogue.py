"""What a shop is made of: products, goals, and where both come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from w2sjax.envs.webshop_search import SearchIndex

SPLITS = ("pretrain", "demos", "train", "dev", "test")
MAX_HITS = 50  # of a search
NO_CAP = 1e6  # price cap of a goal that names none
_CAPS = tuple(10.0 * tens for tens in range(1, 100))
_KEPT_SEARCHES = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """One product as the shop shows it and as purchases are scored."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]  # name → values to choose from
    attributes: tuple[str, ...]  # what it is known to have; not shown
    query: str  # the search that it was found with
    product_category: str  # "Clothing › Men › Shirts"
    price: float
    price_tag: str  # "$12.5", or "$10.0 to $15.0"

    def search_text(self) -> str:
        """The text that searches look into."""
        options = [f"{name}: {', '.join(values)}" for name, values in self.options.items()]
        first_bullet = self.bullets[0] if self.bullets else ""
        parts = (self.title, self.description, first_bullet, ", and ".join(options))
        return " ".join(parts).lower()


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What is to be bought. Any product that has it all is as good as the one it was made from."""

    asin: str
    instruction: str  # with the price clause
    attributes: tuple[str, ...]
    options: tuple[str | tuple[str, str], ...]  # a value, or (name, value)
    price_cap: float  # `NO_CAP` where there is none
    query: str  # of the product, as are the next two
    title: str
    product_category: str

    @classmethod
    def of(
        cls,
        product: Product,
        instruction: str,
        attributes: Sequence[str],
        options: Sequence[str | tuple[str, str]],
        rng: random.Random,
    ) -> Goal:
        """A goal with a price cap drawn above the product's price, and said in the instruction."""
        cap = _draw_cap(product.price, rng)
        clause = "" if cap == NO_CAP else f", and price lower than {cap:.2f} dollars"
        return cls(
            asin=product.asin,
            instruction=instruction + clause,
            attributes=tuple(attributes),
            options=tuple(options),
            price_cap=cap,
            query=product.query,
            title=product.title,
            product_category=product.product_category,
        )


class Tasks(Protocol):
    """Where goals come from."""

    def task_ids(self, split: str, count: int | None) -> list[str]: ...

    def goal(self, task_id: str) -> Goal: ...


class Shop:
    """A catalogue with its search and its tasks; one serves all environments of a process.

    Attributes:
      products: all products, by row.
      asins: their asins, by row.
      tasks: the goals.
      counts: numbers of products and goals, and of what was left out of them, by reason.
    """

    def __init__(
        self,
        products: Sequence[Product],
        asins: Sequence[str],
        index: SearchIndex,
        tasks: Tasks,
        counts: Mapping[str, int],
    ):
        self.products = products
        self.asins = asins
        self.tasks = tasks
        self.counts = dict(counts)
        self.search: Callable[[str], tuple[int, ...]] = functools.lru_cache(_KEPT_SEARCHES)(
            lambda query: index.search(query, MAX_HITS)
        )


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def check_split(split: str) -> None:
    """Raises ValueError for a split that is none of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(
            f"env.webshop: unknown split {split!r}; the splits are {', '.join(SPLITS)}"
        )


def _draw_cap(price: float, rng: random.Random) -> float:
    """The larger of two different ones of the next four multiples of ten above the price."""
    above = [cap for cap in _CAPS if cap > price][:4]
    if len(above) < 2:
        return NO_CAP
    first = int(rng.random() * len(above))
    second = int(rng.random() * (len(above) - 1))
    return above[max(first, second + (second >= first))]
