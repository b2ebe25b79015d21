"""WebShop on files of the official form, made up here."""

import itertools
import json
import random
import re

import pytest

from w2sjax.envs import play, webshop_files, webshop_json
from w2sjax.envs.webshop import WebShop
from w2sjax.envs.webshop_catalogue import NO_CAP, SPLITS
from w2sjax.envs.webshop_json import read_entries


def item(number, **fields):
    plain = {
        "asin": f"B{number:09d}",
        "name": f"Acme Camp Stove Model{number % 7} Kit{number}",
        "category": "garden",
        "query": " Camp Stove ",
        "product_category": "Garden › Outdoor › Stoves",
        "full_description": "Light and stable, with long cord.",
        "small_description": [f"Feature {number}", "water proof"],
        "pricing": f"${number + 1}.50",
        "customization_options": {
            "Color": [{"value": " Navy/Blue ", "image": None}, {"value": "Red", "image": "x"}],
            "Size": None,
        },
        "images": ["x.jpg"],
        "brand": "ignored",
    }
    return plain | fields


def write(directory, items, attributes=None, human=None, suffix="_1000"):
    directory.mkdir(exist_ok=True)
    asins = [entry["asin"] for entry in items if "asin" in entry]
    if attributes is None:
        attributes = {asin: {"attributes": ["easy use", "long cord"]} for asin in asins}
    if human is None:
        human = {asin: [instruction(asin)] for asin in asins}
    for name, value in (
        (f"items_shuffle{suffix}.json", items),
        (f"items_ins_v2{suffix}.json", attributes),
        ("items_human_ins.json", human),
    ):
        (directory / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return directory


def instruction(asin, **fields):
    plain = {
        "instruction": f"i want the camp stove {asin}.",
        "instruction_attributes": ["long cord"],
    }
    return plain | {"instruction_options": ["red"]} | fields


def open_env(tmp_path, **options):
    return WebShop(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """2,000 products with a goal each, and some that are left out."""
    path = tmp_path_factory.mktemp("official")
    items = [item(number) for number in range(2000)]
    items[1:1] = [item(0, name="again"), item(1, asin="nan"), item(1, asin="B" * 11)]
    human = {entry["asin"]: [instruction(entry["asin"])] for entry in items}
    human[item(5)["asin"]].append(instruction("x", instruction_attributes=[]))
    return write(path, items, human=human)


def test_products_are_read_as_published(shop):
    env = open_env(shop)
    assert env.counts == {
        "products": 2000,
        "goals": 2000,
        "products whose asin came before, left out": 1,
        "products without a valid asin, left out": 2,
        "instructions without attributes, left out": 1,
    }
    product = env._shop.products[3]
    assert product.asin == env._shop.asins[3] == "B000000003"
    assert product.options == {"color": ["navy | blue", "red"]}
    assert (product.query, product.price, product.price_tag) == ("camp stove", 4.5, "$4.5")
    assert product.attributes == ("easy use", "long cord")
    assert product.bullets == ("Feature 3", "water proof")
    text = "acme camp stove model3 kit3 light and stable, with long cord. feature 3 color: navy "
    assert product.search_text() == text + "| blue, red"


def test_goals_come_in_the_published_order_and_splits(shop):
    env = open_env(shop)
    order = list(range(2000))
    random.seed(233)
    random.shuffle(order)  # as the original does it
    goals = [env.goal(f"webshop/{index}") for index in range(2000)]
    assert [goal.asin for goal in goals] == [item(number)["asin"] for number in order]
    assert env.task_ids("test") == [f"webshop/{index}" for index in range(500)]
    assert env.task_ids("dev") == [f"webshop/{index}" for index in range(500, 1500)]
    rest = [env.task_ids(split) for split in ("pretrain", "demos", "train")]
    assert [len(ids) for ids in rest] == [250, 50, 200]
    assert sorted(itertools.chain(*rest)) == sorted(
        f"webshop/{index}" for index in range(1500, 2000)
    )
    assert env.task_ids("train", 20) == rest[2][:20] != sorted(rest[2][:20])
    with pytest.raises(ValueError, match=r"501 .* 500 .*of 2000"):
        env.task_ids("test", 501)
    for wrong in ("webshop/2000", "webshop/dev/1", "webshop/x"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            env.reset(wrong)


def test_caps_are_above_the_price_and_said(shop):
    env = open_env(shop)
    ranks = set()
    for number in range(0, 2000, 20):
        goal = next(g for g in env._shop.tasks._goals if g.asin == item(number)["asin"])
        price, said = number + 1.5, "i want the camp stove " + goal.asin
        above = [10.0 * i for i in range(1, 100) if 10.0 * i > price][:4]
        if len(above) < 2:
            assert (goal.price_cap, goal.instruction) == (NO_CAP, said)
            continue
        assert goal.instruction == f"{said}, and price lower than {goal.price_cap:.2f} dollars"
        ranks.add(above.index(goal.price_cap))
        if len(above) == 4:
            assert goal.price_cap != above[0]  # the larger of two
    assert ranks == {1, 2, 3}


def test_the_expert_buys_from_files(shop):
    env = open_env(shop, max_steps=20)
    for split in SPLITS:
        for task in env.task_ids(split, 10):
            assert play(env, task, random_action_rate=0.2, seed=1).status == "success", task


def test_the_indexed_copy_serves_again_and_follows_the_files(shop, tmp_path, monkeypatch):
    directory = write(tmp_path / "data", [item(1), item(2)])
    first = open_env(directory)

    def never(*args):
        raise AssertionError("read again")

    webshop_module = WebShop.__init__.__globals__["_open_shop"]
    webshop_module.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(webshop_files, "_write_copy", never)
        again = open_env(directory)
        assert again._shop is not first._shop
        assert again.goal("webshop/1") == first.goal("webshop/1")
    write(directory, [item(1), item(2), item(3)])
    webshop_module.cache_clear()
    assert open_env(directory).counts["products"] == 3
    assert open_env(directory, num_products=1).counts["products"] == 1
    assert not list((directory / "cache").glob("*.*"))  # nothing half made is left


def test_generated_goals_have_every_combination_of_options(tmp_path):
    size = [{"value": "Large"}, {"value": "small"}]
    colors = item(1)["customization_options"]["Color"]
    items = [item(1, customization_options={"Size": size, "Color": colors}), item(2)]
    attributes = {
        items[0]["asin"]: {
            "attributes": ["easy use"],
            "instruction": "find me a stove",
            "instruction_attributes": ["easy use"],
        }
    }
    env = open_env(write(tmp_path, items, attributes=attributes), goals="generated")
    goals = [env.goal(f"webshop/{index}") for index in range(4)]
    pairs = {
        (("color", color), ("size", s))
        for color in ("navy | blue", "red")
        for s in ("large", "small")
    }
    assert {goal.options for goal in goals} == pairs
    for goal in goals:
        (_, color), (_, s) = goal.options
        assert goal.instruction.startswith(
            f"find me a stove with color: {color}, and size: {s}, and p"
        )
    for index in range(4):
        assert play(env, f"webshop/{index}", random_action_rate=0.0, seed=0).status == "success"
    assert env._shop.products[1].attributes == ("DUMMY_ATTR",)


@pytest.mark.parametrize(
    ("pricing", "price", "tag"),
    [(None, 100.0, "$100.0"), ("", 100.0, "$100.0"), ("$1,299.00", 1299.0, "$1299.0")],
)
def test_prices(pricing, price, tag):
    assert webshop_files._price(pricing, "B01", "") == (price, tag)


def test_a_price_range_is_drawn_once_and_for_all():
    drawn = {webshop_files._price("$10.00 $20.00", f"B{i}", "")[0] for i in range(50)}
    assert len(drawn) == 50 and 10 <= min(drawn) < 12 and 18 < max(drawn) <= 20
    price, tag = webshop_files._price("$10.00 $20.00", "B7", "")
    assert tag == "$10.0 to $20.0" and webshop_files._price("$10.00 $20.00", "B7", "")[0] == price


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"asin": 3}, r"items_shuffle_1000\.json: product 1: field 'asin': .*found 3"),
        ({"name": ["x"]}, r"product 1 \(B000000001\): field 'name'"),
        ({"small_description": [1]}, r"field 'small_description'.*\[1\]"),
        ({"pricing": "free"}, r"field 'pricing': .*'free'"),
        ({"pricing": "$x"}, r"field 'pricing': .*'\$x'"),
        (
            {"customization_options": {"Color": [{"label": "x"}]}},
            r"'customization_options'.*'Color'",
        ),
    ],
)
def test_broken_products_are_named(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        open_env(write(tmp_path, [item(0), item(1, **fields)]))


@pytest.mark.parametrize("field", ["asin", "name", "query", "full_description", "product_category"])
def test_missing_fields_are_named(tmp_path, field):
    broken = item(1)
    del broken[field]
    with pytest.raises(ValueError, match=f"product 1.*no field '{field}'"):
        open_env(write(tmp_path, [item(0), broken], attributes={}, human={}))


@pytest.mark.parametrize("field", ["instruction", "instruction_attributes", "instruction_options"])
def test_broken_instructions_are_named(tmp_path, field):
    broken = instruction("x")
    del broken[field]
    human = {item(0)["asin"]: [instruction("x"), broken]}
    said = rf"items_human_ins\.json: B000000000, instruction 1: no field '{field}'"
    with pytest.raises(ValueError, match=said):
        open_env(write(tmp_path, [item(0)], human=human))


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"env\.options\.data_dir.*nowhere"):
        open_env(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"items_shuffle\*\.json"):
        open_env(tmp_path)
    write(tmp_path, [item(0)])
    write(tmp_path, [item(0), item(1)], suffix="")
    with pytest.raises(ValueError, match=r"\(items_shuffle\.json, items_shuffle_1000.*items_file"):
        open_env(tmp_path)
    assert open_env(tmp_path, items_file="items_shuffle.json").counts["products"] == 2
    assert open_env(tmp_path, items_file="items_shuffle_1000.json").counts["products"] == 1
    with pytest.raises(ValueError, match=r"env\.options\.seed.*3"):
        open_env(tmp_path, items_file="items_shuffle.json", seed=3)
    (tmp_path / "items_human_ins.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"items_human_ins\.json"):
        open_env(tmp_path, items_file="items_shuffle.json", num_products=1)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        [1],
        [12, 3.5, True, None, "a]é🪑", [], {"x": [1, {"y": "}"}]}],
        {"a": 1, "b": {"c": []}},
    ],
    ids=str,
)
def test_entries_of_json_are_those_of_the_whole(tmp_path, monkeypatch, chunk, value):
    monkeypatch.setattr(webshop_json, "_CHUNK", chunk)
    for indent in (None, 2):
        path = tmp_path / "x.json"
        path.write_text(f" {json.dumps(value, indent=indent, ensure_ascii=False)}\n", "utf-8")
        entries = list(read_entries(path))
        expected = enumerate(value) if isinstance(value, list) else value.items()
        assert entries == list(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a JSON list or object, found ''"),
        ("7", "found '7'"),
        ("[1, 2", "entry 2: expected ',', found ''"),
        ("[1 2]", "entry 1: expected ','"),
        ("[1, ]", "entry 1 is broken"),
        ('[{"a": }]', "entry 0 is broken"),
        ('[{"a": 1', "entry 0 is broken"),
        ("[1] x", "'x' after the end"),
        ('{"a" 1}', "expected ':'"),
    ],
)
def test_broken_json_is_named(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        list(read_entries(path))
    assert "x.json" in str(caught.value)
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"x\.json: not UTF-8"):
        list(read_entries(path))
