"""WebShop (arXiv 2207.01206): find a product that an instruction describes, and buy it.

Needs the extra `webshop` (rapidfuzz and PyStemmer); no web server, browser, Lucene or Java. Pages,
actions, goals and rewards are those of the published text environment. The catalogue is generated
(see `webshop_generated.py`), or read from the official files (`webshop_files.py`), which are not
shipped.

  index      search[words]                                           → results, page 1
  results    click[asin], click[next >], click[< prev]               → item, results
  item       click[option value], click[description | features | reviews],
             click[buy now], click[< prev]                           → item, sub page, end, results
  sub page   click[< prev]                                           → item
  any        click[back to search], search[words]                    → index, results

What differs from the published code:

- searches rank by the same BM25 formula, without Lucene's rounding of text lengths to eight bits
  (on random texts that changes 2 % of the first ten hits) and with a regular expression for
  Lucene's word boundaries; the words <r>, <a>, <c> and <q> are nothing special; 1,024 words of a
  query count;
- nouns of titles (`webshop_rewards.py`): another title score, the same factor on the original's
  four test pairs;
- prices within a range and price caps are drawn from the product's asin, so they are the same in
  every process; the original draws them anew each time, from the same distributions;
- product pages have neither ratings nor reviews, as in the original without its review file;
- the page after buying does not show the reward, and nothing happens after it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

from w2sjax.envs import webshop_files, webshop_generated
from w2sjax.envs.base import Outcome
from w2sjax.envs.cache import default_cache
from w2sjax.envs.webshop_catalogue import Goal, Product, Shop
from w2sjax.envs.webshop_expert import Plan, make_plan, option_values, search_queries
from w2sjax.envs.webshop_pages import (
    BACK,
    BUY,
    NEXT,
    OBSERVATIONS,
    PREVIOUS,
    SUB_PAGES,
    Pages,
    parse_action,
)
from w2sjax.envs.webshop_rewards import (
    Reward,
    check_packages,
    score_purchase,
    title_words,
)

_INSTRUCTION = """You shop on a website, for what the instruction asks. Say one action per turn:
search[words] or click[text]. Click a product's code to see it, its option values to choose them, \
and "buy now" to buy it as chosen, which ends the task. Other things to click: next >, < prev, \
back to search, description, features, reviews."""


class WebShop:
    """The environment (see the module's text). Follows `w2sjax.envs.base.Env`.

    Task ids are "webshop/<split>/<index>" for the generated catalogue, where every split is
    endless, and "webshop/<index>" for official files. Splits: pretrain, demos, train, dev, test.
    The score is the published reward of the purchase and 0 before it; success is a reward of 1.

    An action that means nothing on the page gets the page again, as published, or with the
    observation "short" the words "Nothing happens."

    Args:
      max_steps: step limit, counted by whoever plays.
      observation: "full": the published texts, each with the instruction; "short": the instruction
        once, no buttons, a line per product, and one line after a choice.
      page_size: products on a page of results; 10 as published.
      num_products: size of the generated catalogue (400 unless said otherwise), or how many
        products of the official file are read (all).
      seed: of the generated catalogue.
      data_dir: the folder with the official files; "" for the generated catalogue.
      items_file: the name of the products' file in `data_dir` where several are there.
      goals: of official files: "human" or "generated" instructions.
      cache_dir: where official files are indexed; "" for the user's cache folder.
      nouns: "module:function" of a function title → nouns, for instance one that asks spaCy; "" for
        all words but stop words and numbers.
      instruction: another system message; None for the built-in one.

    Example:
      env = make_env("webshop")
      print(env.reset(env.task_ids("train", 1)[0]))
      print(env.step("search[organic tea]").observation)

    Raises:
      ImportError: the packages are missing. FileNotFoundError: no such folder or file. ValueError:
        an option that cannot be, or broken data. Each names it.
    """

    name = "webshop"

    def __init__(
        self,
        *,
        max_steps: int = 10,
        observation: str = "full",
        page_size: int = 10,
        num_products: int | None = None,
        seed: int = 0,
        data_dir: str = "",
        items_file: str = "",
        goals: str = "human",
        cache_dir: str = "",
        nouns: str = "",
        instruction: str | None = None,
    ):
        check_packages()
        _check(isinstance(instruction, str) or instruction is None, "instruction", instruction)
        _check(observation in OBSERVATIONS, "observation", observation, OBSERVATIONS)
        _check(goals in webshop_files.GOALS, "goals", goals, webshop_files.GOALS)
        self.max_steps = _check_int("max_steps", max_steps, 1, 10_000)
        self._page_size = _check_int("page_size", page_size, 1, 50)
        self.instruction = _INSTRUCTION if instruction is None else instruction
        self._nouns = _load_function(nouns) if nouns else title_words
        if data_dir:
            _check(
                seed == 0,
                "seed",
                seed,
                ("0 with a data_dir: only the generated catalogue has one",),
            )
            if num_products is not None:
                _check_int("num_products", num_products, 1, 10**9)
            self._shop = _open_shop(data_dir, items_file, num_products, goals, cache_dir)
        else:
            for option, value in (("items_file", items_file), ("cache_dir", cache_dir)):
                _check(not value, option, value, ("'' without a data_dir",))
            _check(goals == "human", "goals", goals, ("'human' without a data_dir",))
            count = 400 if num_products is None else num_products
            _check_int("num_products", count, 1, webshop_generated.MAX_PRODUCTS)
            self._shop = _make_shop(count, _check_int("seed", seed, 0, 2**63))
        self._pages = Pages(observation, self._page_size)
        self._goal: Goal | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of products and goals read, and of entries left out, by reason."""
        return dict(self._shop.counts)

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The first `count` ids of a split; the order is shuffled once and for all.

        Raises:
          ValueError: unknown split, more tasks than there are, or no count for an endless split.
        """
        return self._shop.tasks.task_ids(split, count)

    def goal(self, task_id: str) -> Goal:
        """The goal of a task, which an agent must not see beyond its instruction."""
        return self._shop.tasks.goal(task_id)

    # ------------------------------------------------------------------------------------ episode

    def reset(self, task_id: str) -> str:
        """Starts a task on the search page; returns it, with the instruction.

        Raises:
          ValueError: not a task id of this environment.
        """
        self._goal = self._shop.tasks.goal(task_id)
        self._reward: Reward | None = None
        self._plan: Plan | None = None
        self._to_index()
        return self._pages.first(self._goal.instruction)

    def step(self, action: str) -> Outcome:
        """Performs one action, any text.

        Raises:
          RuntimeError: no task was started.
        """
        goal = self._started()
        if self._reward is not None:
            observation = "The task is over."
        else:
            observation = self._act(goal, *parse_action(action))
        score = 0.0 if self._reward is None else self._reward.total
        return Outcome(observation, score, self._reward is not None, score == 1.0)

    def _act(self, goal: Goal, verb: str, argument: str) -> str:
        if verb == "search" and argument:
            self._query, self._page_number = argument, 1
            return self._to_results()
        target = self._clickable().get(argument) if verb == "click" else None
        if target is None or argument == "search":
            return self._pages.nothing(self._show())
        if isinstance(target, tuple):
            name, value = target
            self._chosen[name] = value
            return self._pages.choice(name, value, self._show())
        if isinstance(target, int):
            self._row, self._chosen, self._page = target, {}, "item"
            return self._show()
        match target:
            case "back to search":
                self._to_index()
            case "next >" | "< prev" if self._page == "results":
                self._page_number += 1 if target == NEXT else -1
                return self._to_results()
            case "< prev" if self._page == "item":
                return self._to_results()
            case "< prev":
                self._page = "item"
            case "buy now":
                chosen = list(self._chosen.values())
                self._reward = score_purchase(self._product(), chosen, goal, self._nouns)
                self._page = "done"
            case _:
                self._page = target
        return self._show()

    def _to_index(self) -> None:
        self._page = "index"
        self._query, self._hits, self._page_number = "", (), 1
        self._row: int | None = None
        self._chosen: dict[str, str] = {}

    def _to_results(self) -> str:
        self._page, self._row, self._chosen = "results", None, {}
        self._hits = self._shop.search(self._query)
        return self._show()

    def _product(self) -> Product:
        return self._shop.products[self._row]

    def _rows(self) -> tuple[int, ...]:
        """The products on the page of results."""
        start = (self._page_number - 1) * self._page_size
        return self._hits[start : start + self._page_size]

    def _clickable(self) -> dict[str, str | int | tuple[str, str]]:
        """What can be clicked → the button, the product's row, or the option's name and value."""
        match self._page:
            case "index":
                return {"search": "search"}
            case "results":
                previous = (PREVIOUS,) if self._page_number > 1 else ()
                buttons = dict.fromkeys((BACK, *previous, NEXT))
                rows = {self._shop.asins[row].lower(): row for row in self._rows()}
            case "item":
                buttons = dict.fromkeys((BACK, PREVIOUS, *SUB_PAGES, BUY))
                rows = option_values(self._product())
            case "done":
                return {}
            case _:
                buttons, rows = dict.fromkeys((BACK, PREVIOUS)), {}
        # A value that reads like a button is the button, as in the original.
        return {**buttons, **rows, **{button: button for button in buttons}}

    def _show(self) -> str:
        instruction = self._started().instruction
        match self._page:
            case "index":
                return self._pages.index(instruction)
            case "results":
                products = [self._shop.products[row] for row in self._rows()]
                return self._pages.results(
                    instruction, products, self._page_number, len(self._hits)
                )
            case "item":
                return self._pages.item(instruction, self._product())
            case "done":
                return self._pages.done()
        return self._pages.sub_page(instruction, self._product(), self._page)

    # ------------------------------------------------------------------------------------- actions

    def admissible_actions(self) -> list[str]:
        """Everything that can be clicked, and on the search page some searches, sorted.

        Searches are open-ended. Those listed are made of the goal's own words: its attributes with
        the kind of product, that alone and with each attribute, the words of the instruction, and
        the one that the expert makes. Empty after the end of the episode.

        Raises:
          RuntimeError: no task was started.
        """
        goal = self._started()
        if self._page == "index":
            queries = {*search_queries(goal), self._expert_plan().query}
            return sorted(f"search[{query}]" for query in queries if query)
        return sorted(f"click[{text}]" for text in self._clickable())

    def expert_action(self) -> str:
        """What one does who knows the goal's product: search, page to it, choose, buy.

        It leads back to the product from any state. Where no search finds the product, the best hit
        stands in for it.

        Raises:
          RuntimeError: no task was started.
        """
        self._started()
        plan = self._expert_plan()
        if self._page == "index":
            return f"search[{plan.query}]"
        if self._page == "done" or plan.row not in self._hits:
            return f"click[{BACK}]"
        if self._page == "results":
            page = self._hits.index(plan.row) // self._page_size + 1
            if page == self._page_number:
                return f"click[{self._shop.asins[plan.row].lower()}]"
            return f"click[{NEXT if page > self._page_number else PREVIOUS}]"
        if self._page != "item" or self._row != plan.row:
            return f"click[{PREVIOUS}]"
        for name, value in plan.options.items():
            if self._chosen.get(name) != value:
                return f"click[{value}]"
        return f"click[{BUY}]"

    def close(self) -> None:
        """Nothing to free: the catalogue is the process's."""

    def _expert_plan(self) -> Plan:
        if self._plan is None:
            self._plan = make_plan(self._shop, self._started())
        return self._plan

    def _started(self) -> Goal:
        if self._goal is None:
            raise RuntimeError("webshop: no task was started; call reset(task_id) first")
        return self._goal


# One catalogue serves all environments of a process.


@functools.lru_cache(maxsize=8)
def _make_shop(num_products: int, seed: int) -> Shop:
    return webshop_generated.make_shop(num_products, seed)


@functools.lru_cache(maxsize=8)
def _open_shop(
    data_dir: str, items_file: str, num_products: int | None, goals: str, cache_dir: str
) -> Shop:
    cache = Path(cache_dir) if cache_dir else default_cache("webshop")
    return webshop_files.open_shop(Path(data_dir), items_file, num_products, goals, cache)


def _check(good: bool, option: str, value: object, expected: tuple[str, ...] = ("a text",)) -> None:
    if not good:
        raise ValueError(
            f"env.options.{option}: expected {' or '.join(expected)}, got {value!r:.200}"
        )


def _check_int(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"env.options.{name}: expected an integer from {low} to {high}, got {value!r:.200}"
        )
    return value


def _load_function(path: str) -> Callable[[str], list[str]]:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"env.options.nouns: want module:function, cannot import {path!r}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"env.options.nouns: {path!r} is no function")
    return function
