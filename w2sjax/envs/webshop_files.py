"""The official WebShop data: read once, kept as an indexed copy that processes share.

The first use reads the JSON files product by product and writes products, search index and goals
into a folder of the cache; after that, here and in other processes, these files are memory-mapped.
The folder's name depends on the files' sizes and times, so that other files get another folder.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2sjax.envs.webshop_catalogue import SPLITS, Goal, Product, Shop, check_split, stable_hash
from w2sjax.envs.webshop_json import read_entries
from w2sjax.envs.webshop_search import SearchIndex, build_index

GOALS = ("human", "generated")
HUMAN_FILE = "items_human_ins.json"
_FORMAT = 2  # of the indexed copy
_ARRAYS = ("term_bytes", "term_ends", "posting_ends", "posting_texts", "posting_weights")
_ARRAYS += ("top_weights", "num_texts", "product_ends", "asins")
_SHUFFLE_SEED = 233  # of the published order of goals
_TEST, _DEV = 500, 1500  # published: goals 0–499 test, 500–1499 evaluation, all others training
_KEPT_PRODUCTS = 4096
_NO_ATTRIBUTES = ("DUMMY_ATTR",)  # what the original gives products without any

_log = logging.getLogger(__name__)


def open_shop(
    data_dir: Path, items_file: str, num_products: int | None, goals: str, cache_dir: Path
) -> Shop:
    """The shop of official files; indexes them first where that was not done before.

    Args:
      data_dir: the folder with items_shuffle*.json, items_ins_v2*.json and, for human goals,
        items_human_ins.json.
      items_file: the name of the file of products; "" for the only one that is there.
      num_products: how many products of the file are read, from its start; None for all.
      goals: "human" (items_human_ins.json) or "generated" (the instructions of items_ins_v2*.json
        with every combination of option values).
      cache_dir: where the indexed copy goes.

    Raises:
      FileNotFoundError: a file is missing. ValueError: a file does not hold what it should, or
        several could be meant. The message names file, product and field.
    """
    items = _find(data_dir, "items_shuffle*.json", items_file)
    suffix = items.stem.removeprefix("items_shuffle")
    attributes = _find(data_dir, "items_ins_v2*.json", "", prefer=f"items_ins_v2{suffix}.json")
    human = _find(data_dir, HUMAN_FILE, HUMAN_FILE) if goals == "human" else None
    sources = [path for path in (items, attributes, human) if path is not None]
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    key = stable_hash(json.dumps([_FORMAT, stamp, num_products, goals]))
    directory = cache_dir / f"webshop-{key:016x}"
    if not directory.is_dir():
        _log.info("webshop: indexing %s into %s", items, directory)
        _write_copy(directory, items, attributes, human, num_products)
    return _open_copy(directory)


def _find(data_dir: Path, pattern: str, name: str, prefer: str = "") -> Path:
    if not data_dir.is_dir():
        raise FileNotFoundError(f"env.options.data_dir: there is no folder {str(data_dir)!r}")
    found = sorted(data_dir.glob(name or pattern))
    if len(found) > 1 and data_dir / prefer in found:
        found = [data_dir / prefer]
    if not found:
        raise FileNotFoundError(
            f"env.options.data_dir: there is no file {name or pattern} in {str(data_dir)!r}; "
            "WebShop's own set-up script says where its data files are to be had"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"env.options.data_dir: several files {pattern} in {str(data_dir)!r} ({names}); name "
            "the products' in env.options.items_file, and keep one for the attributes or one whose "
            "name ends alike"
        )
    return found[0]


# ---------------------------------------------------------------------------------------- reading


class _Source:
    """Reads products in file order; collects goals and counts on the way."""

    def __init__(self, items: Path, attributes: Path, human: Path | None, num_products: int | None):
        self._items, self._attributes_file, self._human_file = items, attributes, human
        self._limit = num_products
        self.goals: list[Goal] = []
        self.asins: list[str] = []
        self.counts: Counter[str] = Counter()
        self._attributes: dict[str, str] = {}  # joined by line breaks: compact
        self._instructions: dict[str, tuple[str, list[str]]] = {}
        for asin, entry in read_entries(attributes):
            where = f"{attributes}: {asin}"
            if "attributes" in entry:
                self._attributes[asin] = "\n".join(_texts(entry["attributes"], where, "attributes"))
            if human is None and entry.get("instruction") is not None:
                wanted = _texts(
                    _field(entry, "instruction_attributes", where), where, "instruction_attributes"
                )
                self._instructions[asin] = (_text(entry, "instruction", where), wanted)
        self._human: Mapping[str, Any] = dict(read_entries(human)) if human is not None else {}

    def products(self) -> Iterator[Product]:
        seen: set[str] = set()
        for index, item in itertools.islice(read_entries(self._items), self._limit):
            where = f"{self._items}: product {index}"
            if not isinstance(item, dict):
                raise ValueError(f"{where}: expected an object, found {type(item).__name__}")
            asin = _text(item, "asin", where)
            if asin == "nan" or len(asin) > 10:
                self.counts["products without a valid asin, left out"] += 1
            elif asin in seen:
                self.counts["products whose asin came before, left out"] += 1
            else:
                seen.add(asin)
                self.asins.append(asin)
                product = self._product(item, f"{where} ({asin})")
                self._add_goals(product)
                yield product
        self.counts["products"] = len(seen)
        self.counts["goals"] = len(self.goals)

    def _product(self, item: Mapping[str, Any], where: str) -> Product:
        asin = item["asin"]
        bullets = _field(item, "small_description", where)
        listed = bullets if isinstance(bullets, list) else [bullets]
        price, tag = _price(item.get("pricing"), asin, where)
        attributes = self._attributes.get(asin)
        return Product(
            asin=asin,
            title=_text(item, "name", where),
            description=_text(item, "full_description", where),
            bullets=tuple(
                _texts(["" if b is None else b for b in listed], where, "small_description")
            ),
            options=_options(_field(item, "customization_options", where), where),
            attributes=_NO_ATTRIBUTES
            if attributes is None
            else tuple(filter(None, attributes.split("\n"))),
            query=_text(item, "query", where).lower().strip(),
            product_category=_text(item, "product_category", where),
            price=price,
            price_tag=tag,
        )

    def _add_goals(self, product: Product) -> None:
        """Appends the goals made from a product, in the published order."""
        asin = product.asin
        for number, entry in enumerate(self._human.get(asin, ())):
            where = f"{self._human_file}: {asin}, instruction {number}"
            attributes = _texts(
                _field(entry, "instruction_attributes", where), where, "instruction_attributes"
            )
            if not attributes:
                self.counts["instructions without attributes, left out"] += 1
                continue
            options = _texts(
                _field(entry, "instruction_options", where), where, "instruction_options"
            )
            instruction = _text(entry, "instruction", where).strip(".")
            self._add_goal(product, instruction, attributes, options, number)
        if asin in self._instructions:
            instruction, attributes = self._instructions[asin]
            if not attributes:
                raise ValueError(f"{self._attributes_file}: {asin}: no instruction_attributes")
            names = sorted(product.options)
            combinations = itertools.product(*(product.options[name] for name in names))
            for number, values in enumerate(combinations):
                pairs = list(zip(names, values, strict=True))
                said = ", and ".join(f"{name}: {value}" for name, value in pairs)
                text = f"{instruction} with {said}" if said else instruction
                self._add_goal(product, text, attributes, pairs, number)

    def _add_goal(
        self, product: Product, instruction: str, attributes: list[str], options: Any, number: int
    ) -> None:
        rng = random.Random(stable_hash(f"webshop cap {product.asin} {number}"))
        self.goals.append(Goal.of(product, instruction, attributes, options, rng))


def _field(entry: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in entry:
        raise ValueError(f"{where}: no field {name!r}")
    return entry[name]


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = _field(entry, name, where)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r}: expected a text, found {value!r:.80}")
    return value


def _texts(value: Any, where: str, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError(f"{where}: field {name!r}: expected a list of texts, found {value!r:.80}")
    return value


def _options(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    options = {}
    for name, contents in (value or {}).items():
        if contents is None:
            continue
        try:
            values = [content["value"].strip().replace("/", " | ").lower() for content in contents]
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{where}: field 'customization_options': {name!r}: expected a list of "
                f"objects with a text 'value', found {contents!r:.80}"
            ) from error
        options[name.lower()] = tuple(values)
    return options


def _price(pricing: Any, asin: str, where: str) -> tuple[float, str]:
    """The price and what the shop shows; of a range, a price drawn from it by the asin."""
    if not pricing:
        return 100.0, "$100.0"
    try:
        prices = [float(re.sub(r"[^\d.]", "", part)) for part in pricing.split("$")[1:]]
        low, *others = prices
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{where}: field 'pricing': no price in {pricing!r:.80}") from error
    if not others:
        return low, f"${low}"
    share = random.Random(stable_hash(f"webshop price {asin}")).random()
    return low + share * (others[0] - low), f"${low} to ${others[0]}"


# --------------------------------------------------------------------------------- the indexed copy


def _write_copy(
    directory: Path, items: Path, attributes: Path, human: Path | None, limit: int | None
) -> None:
    source = _Source(items, attributes, human, limit)
    directory.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        ends: list[int] = []
        with open(making / "products.jsonl", "wb") as file:

            def texts() -> Iterator[str]:
                for product in source.products():
                    fields = [getattr(product, name) for name in Product.__slots__]
                    file.write(json.dumps(fields, ensure_ascii=False).encode(errors="replace"))
                    ends.append(file.tell())
                    yield product.search_text()

            arrays = build_index(texts())
        arrays["product_ends"] = np.array(ends, np.int64)
        arrays["asins"] = np.array([asin.encode(errors="replace") for asin in source.asins], "S40")
        for name in _ARRAYS:
            np.save(making / f"{name}.npy", arrays[name], allow_pickle=False)
        goals = [[getattr(goal, name) for name in Goal.__slots__] for goal in source.goals]
        random.Random(_SHUFFLE_SEED).shuffle(goals)
        (making / "goals.json").write_text(json.dumps(goals), encoding="utf-8")
        (making / "counts.json").write_text(json.dumps(source.counts), encoding="utf-8")
        try:
            os.rename(making, directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _open_copy(directory: Path) -> Shop:
    arrays = {
        name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in _ARRAYS
    }
    goals = []
    for fields in json.loads((directory / "goals.json").read_text(encoding="utf-8")):
        goal = dict(zip(Goal.__slots__, fields, strict=True))
        goal["attributes"] = tuple(goal["attributes"])
        goal["options"] = tuple(o if isinstance(o, str) else tuple(o) for o in goal["options"])
        goals.append(Goal(**goal))
    return Shop(
        _ProductFile(directory / "products.jsonl", arrays["product_ends"]),
        _Asins(arrays["asins"]),
        SearchIndex(arrays),
        FileTasks(goals),
        json.loads((directory / "counts.json").read_text(encoding="utf-8")),
    )


class _Asins(Sequence[str]):
    def __init__(self, array: np.ndarray):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, row: int) -> str:
        return self._array[row].decode()


class _ProductFile(Sequence[Product]):
    """Products in a file, read when they are asked for."""

    def __init__(self, path: Path, ends: np.ndarray):
        self._bytes = np.memmap(path, np.uint8, "r") if len(ends) else np.zeros(0, np.uint8)
        self._ends = ends
        self._read = functools.lru_cache(_KEPT_PRODUCTS)(self._read_row)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Product:
        return self._read(row)

    def _read_row(self, row: int) -> Product:
        start = self._ends[row - 1] if row else 0
        fields = json.loads(self._bytes[start : self._ends[row]].tobytes())
        product = dict(zip(Product.__slots__, fields, strict=True))
        for name in ("bullets", "attributes"):
            product[name] = tuple(product[name])
        return Product(**product)


class FileTasks:
    """Goals of official files: "webshop/<index>", the index in the published order.

    `test` and `dev` are the published test and evaluation sets, in order; the published training
    set is shuffled once and cut into `pretrain` (half), `demos` (a tenth) and `train` (the rest).
    """

    def __init__(self, goals: Sequence[Goal]):
        self._goals = goals

    def split(self, split: str) -> list[int]:
        """The indices of a split's goals, in the order in which tasks are given out."""
        check_split(split)
        if split == "test":
            return list(range(min(_TEST, len(self._goals))))
        if split == "dev":
            return list(range(_TEST, min(_DEV, len(self._goals))))
        rest = list(range(_DEV, len(self._goals)))
        random.Random(_SHUFFLE_SEED).shuffle(rest)
        half, end = len(rest) // 2, len(rest) // 2 + len(rest) // 10
        cut = dict(zip(SPLITS, (rest[:half], rest[half:end], rest[end:]), strict=False))
        return cut[split]

    def task_ids(self, split: str, count: int | None) -> list[str]:
        indices = self.split(split)
        if count is not None and not 0 <= count <= len(indices):
            raise ValueError(
                f"env.webshop: {count} tasks of split {split!r} asked for, but these files have "
                f"{len(indices)} there (of {len(self._goals)} goals)"
            )
        return [f"webshop/{index}" for index in indices[:count]]

    def goal(self, task_id: str) -> Goal:
        name, _, index = task_id.partition("/")
        if name != "webshop" or not (index.isascii() and index.isdigit()) or len(index) > 18:
            raise ValueError(
                f"env.webshop: {task_id[:200]!r} is no task id of the official data; they read "
                "webshop/<index>"
            )
        if int(index) >= len(self._goals):
            raise ValueError(
                f"env.webshop: {task_id!r}: these files have goals 0 to {len(self._goals) - 1}"
            )
        return self._goals[int(index)]
