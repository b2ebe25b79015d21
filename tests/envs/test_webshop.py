"""Laws of WebShop on its generated catalogue."""

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.envs import Env, EnvPool, PlayRequest, make_env, play
from w2sjax.envs import webshop_generated as generated
from w2sjax.envs.webshop import WebShop
from w2sjax.envs.webshop_catalogue import SPLITS
from w2sjax.envs.webshop_generated import KINDS
from w2sjax.envs.webshop_pages import parse_action
from w2sjax.envs.webshop_rewards import match_options, score_purchase, similar

SHORT = {"observation": "short", "page_size": 5}


def goal_product(env, task_id):
    goal = env.goal(task_id)
    return next(product for product in env._shop.products if product.asin == goal.asin)


def state(env):
    return {name: value for name, value in vars(env).items() if name != "_plan"}


def test_follows_the_protocol():
    env = make_env("webshop", max_steps=7)
    assert isinstance(env, Env) and env.max_steps == 7
    for call in (env.admissible_actions, env.expert_action, lambda: env.step("click[search]")):
        with pytest.raises(RuntimeError, match="reset"):
            call()
    env.reset(env.task_ids("train", 1)[0])
    env.close()
    env.close()


# ------------------------------------------------------------------------------------ the catalogue


def test_options_and_attributes_of_a_kind_do_not_match_each_other():
    for kind in KINDS.values():
        for one, other in itertools.combinations(kind.attributes, 2):
            assert not similar(one, other), (one, other)
        values = list(itertools.chain(*kind.options.values()))
        for one, other in itertools.permutations(values, 2):
            assert not match_options([one], [other]), (one, other)
    for one, other in itertools.combinations(KINDS.values(), 2):
        assert len(set(one.attributes) & set(other.attributes)) <= 1


def test_the_catalogue_has_near_duplicates_and_distinct_prices():
    products = WebShop()._shop.products
    assert len({product.asin for product in products}) == len(products) == 400
    for kind in KINDS:
        same = [product for product in products if product.query == kind]
        assert len(same) == 50
        assert len({product.price for product in same}) == 50
        assert len({product.title for product in same}) < 45
        shared = [
            len(set(a.attributes) & set(b.attributes)) for a, b in itertools.combinations(same, 2)
        ]
        assert {1, 2, 3} <= set(shared)


def test_no_product_is_the_goal_of_two_splits():
    env = WebShop()
    asins = {split: {env.goal(t).asin for t in env.task_ids(split, 800)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not asins[one] & asins[other]
    assert all(len(asins[split]) > 30 for split in SPLITS)
    kinds = [goal_product(env, t).query for t in env.task_ids("train", 160)]
    assert all(8 <= kinds.count(kind) <= 40 for kind in KINDS)
    assert env.task_ids("dev", 30) == env.task_ids("dev", 50)[:30]


def test_goals_are_fulfilled_by_their_product_and_never_by_another_kind():
    env = WebShop()
    for task_id in env.task_ids("train", 60):
        goal, product = env.goal(task_id), goal_product(env, task_id)
        assert score_purchase(product, goal.options, goal).total == 1.0
        assert score_purchase(product, [], goal).total < 1.0
        assert product.price < goal.price_cap <= product.price + 40
        assert f", and price lower than {goal.price_cap:.2f} dollars" in goal.instruction
        best = {
            other.asin: score_purchase(
                other, set(goal.options) & set(options_of(other)), goal
            ).total
            for other in env._shop.products
        }
        full = [other for other in env._shop.products if best[other.asin] == 1.0]
        assert {other.query for other in full} == {product.query}
        assert len(full) <= 15 and len(set(best.values())) >= 4


def options_of(product):
    return itertools.chain(*product.options.values())


def test_every_attribute_is_on_the_features_page():
    env = WebShop()
    for product in env._shop.products[::20]:
        for attribute in product.attributes:
            assert attribute in product.bullets[0]


# -------------------------------------------------------------------------------------- the episode


def test_pages_read_as_published():
    env = WebShop()
    task = env.task_ids("dev", 1)[0]
    goal, product = env.goal(task), goal_product(env, task)
    head = f"Instruction: [SEP] {goal.instruction} [SEP] Back to Search"
    index = f"WebShop [SEP] Instruction: [SEP] {goal.instruction} [SEP] Search"
    assert env.reset(task) == index
    results = env.step(f"search[{product.title}]").observation
    assert results.startswith(f"{head} [SEP] Page 1 (Total results: 50) [SEP] Next > [SEP] ")
    assert f"[SEP] {product.asin} [SEP] {product.title} [SEP] {product.price_tag}" in results
    assert results.count("$") == 10
    second = env.step("click[Next >]").observation
    assert f"{head} [SEP] Page 2 (Total results: 50) [SEP] < Prev [SEP] Next > [SEP] P" in second
    assert env.step("click[< prev]").observation == results
    item = env.step(f"click[{product.asin}]").observation
    options = " [SEP] ".join(t for n, vs in product.options.items() for t in (n, *vs))
    assert item == (
        f"{head} [SEP] < Prev [SEP] {options} [SEP] {product.title} [SEP] Price: "
        f"{product.price_tag} [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews "
        "[SEP] Buy Now"
    )
    value = next(options_of(product))
    assert env.step(f"click[{value}]").observation == item
    back = f"{head} [SEP] < Prev"
    assert env.step("click[Features]").observation == f"{back} [SEP] {product.bullets[0]}"
    assert env.step("click[< Prev]").observation == item
    assert list(env._chosen.values()) == [value]  # kept over sub pages
    assert env.step("click[description]").observation == f"{back} [SEP] {product.description}"
    env.step("click[< prev]")
    assert env.step("click[reviews]").observation == back
    env.step("click[< prev]")
    assert env.step("click[< prev]").observation == results
    env.step(f"click[{product.asin.lower()}]")
    assert not env._chosen  # lost by going back to the results
    assert env.step("click[back to search]").observation == index
    assert env.step("search[ ]").observation.startswith(f"{head} [SEP] Page 1 (Total results: 0)")


def test_short_pages_say_what_is_new():
    env = WebShop(**SHORT)
    task = env.task_ids("dev", 1)[0]
    product = goal_product(env, task)
    assert env.reset(task) == env.goal(task).instruction
    results = env.step(env.expert_action()).observation.split("\n")
    assert results[0] == "Page 1 of 10." and len(results) == 6
    env.step(f"search[{product.title}]")
    item = env.step(f"click[{product.asin}]").observation
    assert item.split("\n")[0] == f"{product.title} {product.price_tag}"
    name, values = next(iter(product.options.items()))
    said = env.step(f"click[{values[0]}]").observation
    assert said == f"You choose {name}: {values[0]}."
    assert env.step("click[sofa]").observation == "Nothing happens."
    assert env.step("click[reviews]").observation == "No reviews."
    assert env.step("click[back to search]").observation == "Search page."


def test_results_end_with_an_empty_page():
    env = WebShop()
    env.reset(env.task_ids("dev", 1)[0])
    env.step("search[tea]")
    for _ in range(5):
        page = env.step("click[next >]").observation
    assert page.endswith("Page 6 (Total results: 50) [SEP] < Prev [SEP] Next >")
    assert "click[next >]" in env.admissible_actions()


def test_a_search_works_from_every_page():
    env = WebShop()
    task = env.task_ids("dev", 1)[0]
    env.reset(task)
    first = env.step("search[organic tea]").observation
    asin = re.search(r"P\d+", first).group()
    for clicks in ([], [asin], [asin, "features"]):
        for click in clicks:
            env.step(f"click[{click}]")
        assert env.step("search[organic tea]").observation == first


def test_buying_scores_and_ends():
    env = WebShop()
    seen = set()
    for task in env.task_ids("train", 40):
        goal = env.goal(task)
        for hit in range(3):
            env.reset(task)
            assert env.step(env.expert_action()).score == 0.0
            product = env._shop.products[env._hits[hit]]
            env.step(f"click[{product.asin}]")
            value = next(options_of(product))
            assert env.step(f"click[{value}]").score == 0.0
            outcome = env.step("click[Buy Now]")
            assert outcome.score == score_purchase(product, [value], goal).total
            assert (outcome.done, outcome.success) == (True, outcome.score == 1.0)
            assert not re.search(r"\d", outcome.observation)  # the reward stays unsaid
            after = env.step(f"click[{value}]")
            assert (after.score, after.done) == (outcome.score, True)
            assert env.admissible_actions() == []
            seen.add(round(outcome.score, 2))
    assert len(seen) >= 4


def test_the_last_choice_of_an_option_counts():
    env = WebShop()
    task = next(t for t in env.task_ids("dev", 50) if len(env.goal(t).options) == 2)
    product = goal_product(env, task)
    wanted = env.goal(task).options
    env.reset(task)
    env.step(f"search[{product.title}]")
    env.step(f"click[{product.asin}]")
    for value in [*options_of(product), *wanted]:
        env.step(f"click[{value}]")
    assert env.step("click[buy now]").success


@pytest.mark.parametrize("options", [{}, SHORT])
@pytest.mark.parametrize("split", SPLITS)
def test_the_expert_wins_within_the_limit(split, options):
    env = WebShop(**options)
    played = [play(env, task, random_action_rate=0.0, seed=0) for task in env.task_ids(split, 150)]
    assert sum(episode.status == "success" for episode in played) >= 148
    assert sum(len(episode.actions) for episode in played) / 150 < 6


@pytest.mark.parametrize("options", [{}, SHORT])
def test_the_expert_leads_back_from_anywhere(options):
    env = WebShop(**options)
    rng = random.Random(0)
    for task_id in env.task_ids("dev", 80):
        env.reset(task_id)
        for _ in range(8):
            others = [a for a in env.admissible_actions() if a != "click[buy now]"]
            env.step(rng.choice([*others, "search[sofa]", f"search[{rng.choice(list(KINDS))}]"]))
        for _ in range(20):
            action = env.expert_action()
            assert action in env.admissible_actions()
            outcome = env.step(action)
            if outcome.done:
                break
        assert outcome.success


def test_admissible_actions_mean_something():
    env = WebShop()
    rng = random.Random(1)
    for task_id in env.task_ids("train", 30):
        env.reset(task_id)
        for _ in range(10):
            actions = env.admissible_actions()
            assert actions == sorted(set(actions))
            if not actions:
                break
            before, action = state(env), rng.choice(actions)
            for other in ("click[nothing]", "click[search]", "buy now", f"Click{action[5:]}"):
                env.step(other)
                assert state(env) == before
            env.step(action)
            again = action in (f"click[{value}]" for value in before["_chosen"].values())
            assert (state(env) != before) or again


def transcript():
    env = WebShop()
    played = [
        play(env, task_id, random_action_rate=0.4, seed=5)
        for split in SPLITS
        for task_id in env.task_ids(split, 6)
    ]
    return hashlib.sha256(repr(played).encode()).hexdigest()


def test_a_task_is_the_same_in_every_process():
    code = "import test_webshop; print(test_webshop.transcript())"
    paths = [os.path.dirname(__file__), *filter(None, sys.path)]
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == transcript(), done.stderr


def test_it_plays_in_worker_processes():
    env = WebShop(**SHORT)
    requests = [PlayRequest(task, 0.3, 1) for task in env.task_ids("train", 6)]
    with EnvPool("webshop", SHORT, num_slots=2, num_workers=1) as pool:
        played = dict(pool.play(requests))
    expected = [play(env, r.task_id, random_action_rate=0.3, seed=1) for r in requests]
    assert [played[index] for index in range(6)] == expected


# ------------------------------------------------------------------------------------- odd requests

ODD = st.one_of(
    st.text(max_size=60),
    st.tuples(
        st.sampled_from(("search", "click", "Search", "CLICK", "buy", "")),
        st.sampled_from(("[", "", "[[", " [")),
        st.text(max_size=40)
        | st.sampled_from(("buy now", "< prev", "next >", "red", "<r>", "<a>")),
        st.sampled_from(("]", "", "]]", "]\n", "] now")),
    ).map("".join),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ODD, max_size=6), st.integers(0, 30), st.booleans())
def test_odd_actions_never_break_it(actions, index, short):
    env = WebShop(**(SHORT if short else {}))
    env.reset(f"webshop/dev/{index}")
    done = False
    for action in actions:
        outcome = env.step(action)
        assert isinstance(outcome.observation, str) and outcome.observation
        assert 0.0 <= outcome.score <= 1.0 and (outcome.done or not done)
        done = outcome.done
    assert env.expert_action()
    assert done or env.admissible_actions()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab[]\n ", max_size=14))
def test_actions_are_read_as_by_the_published_expression(action):
    match = re.match(r"(.+)\[(.+)\]", action)
    verb, argument = parse_action(action)
    if match:
        assert (verb, argument) == (match[1], match[2].lower())
    else:
        assert argument == ""


@pytest.mark.parametrize(
    "action",
    [
        *("", " ", "\x00", "[" * 200_000, "search[" * 30_000, "click[" + "x" * 200_000 + "]"),
        *("search[" + "tea " * 50_000 + "]", "search[" + "🪑" * 50_000 + "]", "\ud800", "search[]"),
        *("search[\x00]", "search[\ud800]", "click[]", "search[tea", "]search["),
    ],
    ids=lambda action: repr(action[:16]),
)
def test_garbage_is_answered_at_once(action):
    env = WebShop()
    env.reset("webshop/train/0")
    start = time.process_time()
    assert env.step(action).observation
    assert time.process_time() - start < 0.5
    assert env.admissible_actions()


def test_speed_and_size():
    """2,000 steps/s of one core is asked for; a catalogue in less than a second."""
    start = time.process_time()
    generated.make_shop(400, seed=1)
    assert time.process_time() - start < 1.0
    env = WebShop()
    played = [play(env, t, random_action_rate=0.3, seed=0) for t in env.task_ids("train", 150)]
    rates = []
    for _ in range(3):
        start = time.process_time()
        for episode in played:
            env.reset(episode.task_id)
            for action in episode.actions:
                env.step(action)
        seconds = time.process_time() - start
        rates.append(sum(len(episode.actions) for episode in played) / seconds)
    assert max(rates) > 5_000


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_steps", value) for value in (0, "10", True)),
        *(("page_size", value) for value in (0, 51)),
        *(("num_products", value) for value in (0, 8001, 2.5)),
        *(("observation", "rich"), ("goals", "all"), ("instruction", 3), ("seed", -1)),
        *(("cache_dir", "/x"), ("goals", "generated"), ("items_file", "x.json")),
        *(("nouns", "nowhere:at_all"), ("nouns", "random")),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=rf"env\.options\.{option}.*{re.escape(repr(value))}"):
        make_env("webshop", **{option: value})


def test_too_few_products_are_named():
    with pytest.raises(ValueError, match=r"env\.options\.num_products.* 8 products"):
        make_env("webshop", num_products=8)


def test_options_are_used():
    env = WebShop(num_products=163, seed=3, nouns="test_webshop:no_nouns", instruction="Shop.")
    assert env.counts["products"] == 163 and env.instruction == "Shop."
    assert env.reset("webshop/dev/0") != WebShop(num_products=163).reset("webshop/dev/0")
    for _ in range(10):
        outcome = env.step(env.expert_action())
    assert outcome.done and outcome.score == 1.0  # no nouns wanted: 0.2, and the same query


def no_nouns(title):
    return []


@pytest.mark.parametrize(
    "task_id",
    [
        *("", "webshop/train", "webshop/train/-1", "webshop/train/1/2", "webshop/train/²"),
        *("household/train/1", "webshop/nowhere/1", "webshop/7", "webshop/train/1" + "0" * 5000),
    ],
    ids=lambda task_id: task_id[:24],
)
def test_a_wrong_task_id_is_named(task_id):
    with pytest.raises(ValueError, match=r"env\.webshop: .*(no task id|unknown split)"):
        WebShop().reset(task_id)


def test_wrong_requests_for_tasks():
    env = WebShop()
    with pytest.raises(ValueError, match=r"'valid'.*pretrain, demos, train, dev, test"):
        env.task_ids("valid", 3)
    for count in (None, -1):
        with pytest.raises(ValueError, match="endless"):
            env.task_ids("train", count)


def test_missing_packages_say_what_to_do():
    code = (
        "import sys; sys.modules[{!r}] = None\n"
        "from w2sjax.envs import make_env\n"
        "try:\n    make_env('webshop')\n"
        "except ImportError as error:\n    print(error)"
    )
    for package in ("rapidfuzz", "Stemmer"):
        command = [sys.executable, "-c", code.format(package)]
        paths = os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))
        env = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert "pip install -e '.[webshop]'" in done.stdout, done.stderr
