"""WebShop's reward: the published examples, and laws."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.envs import webshop_rewards
from w2sjax.envs.webshop_catalogue import Goal, Product
from w2sjax.envs.webshop_rewards import (
    COLORS,
    match_attributes,
    match_options,
    score_purchase,
    similar,
    simple_color,
    title_score,
    type_factor,
)

SHOE = "Mens D.O.N. Issue 2 Gca Basketball Sneakers Shoes Casual - Off White"
CORD = "Saireed UL Listed 2 Prong Power Cord for JBL Bar 3.1 Bar 2.1 Channel 4K Ultra HD Soundbar"
AC_CORD = (
    "BRST AC Power Cord Outlet Socket Cable Plug Lead for Panasonic SC-HT830V DVD/VCR Combo "
    "Home Theater System"
)
TITLES = [  # title, goal's title, spaCy's score in the published tests, ours
    (
        "PEAK High Top Mens Basketball Shoes Lou Williams Streetball Master Breathable Non Slip "
        "Outdoor Sneakers",
        SHOE,
        0.333,
        0.400,
    ),
    (AC_CORD, f"{CORD} Home Theater System Subwoofer", 0.30, 0.278),
    (AC_CORD, CORD, 0.15, 0.143),
    (
        "Minkissy 2pcs Stainless Steel Eyebrow Tweezers Blackhead Acne Remover Portable Makeup "
        "Tweezers (Silver)",
        "Rusticware 921ORB Kitchen and Bath Cabinet Knob",
        0.0,
        0.0,
    ),
]


def make_product(**fields):
    plain = {"asin": "B01", "title": SHOE, "description": "", "bullets": (), "options": {}}
    plain |= {"attributes": (), "query": "query 1", "product_category": "a › b › c"}
    return Product(**(plain | {"price": 35.0, "price_tag": "$35.0"} | fields))


def make_goal(**fields):
    plain = {"asin": "B01", "instruction": "", "attributes": (), "options": (), "price_cap": 40.0}
    plain |= {"query": "query 1", "title": SHOE, "product_category": "a › b › c"}
    return Goal(**(plain | fields))


def test_the_published_examples():
    """The four totals of the original's unit test of its reward."""
    wanted = ("tea tree", "essential oils", "natural ingredients")
    options = (("color", "grey"), ("size", "XL"))
    goal = make_goal(attributes=wanted, options=options)
    product = make_product(attributes=("tea tree", "essential oil", "natural ingredients"))
    chosen = ["grey", "XL"]
    assert score_purchase(product, chosen, goal).total == 1.0
    # The published test gives the features as one text where a list of texts is meant, so that
    # nothing is found in them: (1 attribute + 2 options + price) of 6.
    product = make_product(description="Best shampoo, made with natural ingredients")
    assert score_purchase(product, chosen, goal).total == pytest.approx(0.667, abs=1e-3)
    goal = make_goal(attributes=wanted, options=(*options, ("amount", "pack of 12")))
    assert score_purchase(product, chosen, goal).total == pytest.approx(0.571, abs=1e-3)
    product = make_product(
        title=AC_CORD,
        description=product.description,
        query="query 2",
        product_category="a › d › e",
    )
    goal = make_goal(attributes=wanted, options=goal.options, title=CORD)
    assert score_purchase(product, chosen, goal).total == pytest.approx(0.286, abs=1e-3)


@pytest.mark.parametrize(("title", "goal_title", "spacy", "ours"), TITLES)
def test_titles_fall_on_the_published_side_of_every_threshold(title, goal_title, spacy, ours):
    assert title_score(title, goal_title) == pytest.approx(ours, abs=1e-3)
    for threshold in (0.0, 0.1, 0.2):
        assert (ours > threshold) == (spacy > threshold)


@pytest.mark.parametrize(
    ("query", "category", "title", "factor"),
    [
        ("query 1", "d › e › f", "off white paint", 1.0),  # 2 of 10 nouns: the query decides
        ("query 2", "b › c › a", "off white paint", 1.0),  # two common categories in any order
        ("query 2", "a › a › d", "off white paint", 0.5),  # a single one
        ("query 2", "d › e › f", "casual off white paint", 1.0),  # 3 of 10
        ("query 1", "a › b › c", "a tent", 0.0),  # no common noun overrides all else
    ],
)
def test_the_kind_of_product(query, category, title, factor):
    product = make_product(query=query, product_category=category, title=title)
    assert type_factor(product, make_goal()) == factor


def test_a_title_that_has_next_to_nothing_in_common_counts_a_tenth():
    goal = make_goal(title=" ".join(f"word{chr(97 + i)}" for i in range(11)))
    assert type_factor(make_product(title="worda other"), goal) == 0.1
    assert title_score("anything", "2 the 3.5") == 0.2  # a goal without nouns


@pytest.mark.parametrize(
    ("own", "features", "description", "matched"),
    [
        (("tea tree", "essential oil", "natural ingredients"), (), "", 3),
        (("essential oil", "natural ingredients"), (), "", 2),
        ((), ("It has Essential Oils and smells",), "Made with natural ingredients", 2),
        (("tea bag", "earl gray", "lipton"), ("Soothing aroma",), "Best tea", 0),
    ],
)
def test_published_attribute_examples(own, features, description, matched):
    product = make_product(attributes=own, bullets=features, description=description, title="")
    assert (
        match_attributes(product, ["tea tree", "essential oils", "natural ingredients"]) == matched
    )


@pytest.mark.parametrize(
    ("chosen", "wanted", "matched"),
    [
        (["pack of 12", "grey", "XL"], ["grey", "XL", "pack of 12"], 3),
        (["pack of 12", "blue", "XL"], ["grey", "XL", "pack of 12"], 2),
        (["pack of 12", "powder snow", "XL"], ["cool powder snow", "XL", "pack of 12"], 3),
        (["goal 1"], [], 0),
        ([], ["goal 1"], 0),
        (["grey"], [("color", "grey")], 1),
        (["dark grey"], ["dark gold"], 1),  # both are "dark" to the original
        (["dark grey"], ["dark blue"], 0),  # the latter is "blue", which comes first in the list
        (["dark grey"], [("color", "dark blue")], 1),  # a pair stays, unless it is a bare colour
        (["navy blue"], [("color", "navy")], 0),
    ],
)
def test_published_option_examples(chosen, wanted, matched):
    assert match_options(chosen, wanted) == matched


@pytest.mark.parametrize(
    ("text", "color"),
    [
        *(("", ""), ("black forest", "black"), ("violet lavender", "lavender")),
        *(("steelivy fuchsia", "fuchsia"), ("123alabaster", "alabaster"), ("red ash", "ash")),
        ("webshop", "webshop"),
    ],
)
def test_the_first_color_of_the_list_counts(text, color):
    assert simple_color(text) == color
    assert len(COLORS) == len(set(COLORS)) == 102 and list(COLORS) == sorted(COLORS)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_similarity_is_symmetric_and_total(one, other):
    assert similar(one, other) == similar(other, one)
    words = [word for word in one.split() if word.isascii() and word.isalnum()]
    if words:
        assert similar(" ".join(words).upper(), " ".join(reversed(words)))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_more_of_what_is_wanted_never_pays_less(data):
    wanted = data.draw(st.sets(st.sampled_from(["vegan", "organic", "water proof"]), min_size=1))
    own = data.draw(st.lists(st.sampled_from(["vegan", "organic", "water proof"])))
    options = data.draw(st.lists(st.sampled_from(["grey", "XL", "queen"]), unique=True))
    chosen = data.draw(st.lists(st.sampled_from(["grey", "XL", "queen"])))
    goal = make_goal(attributes=tuple(wanted), options=tuple(options))
    score = score_purchase(make_product(attributes=tuple(own)), chosen, goal)
    assert 0.0 <= score.total <= 1.0
    full = make_product(attributes=tuple({*own, *wanted}))
    assert score_purchase(full, [*chosen, *options], goal).total == 1.0
    dear = make_product(attributes=tuple(own), price=41.0)
    loss = score.total - score_purchase(dear, chosen, goal).total
    assert loss == pytest.approx(1 / (len(wanted) + len(options) + 1))


def test_other_nouns_can_be_given():
    goal = make_goal(title="red tent", query="x", product_category="z")
    product = make_product(title="red car", query="y", product_category="w")
    assert score_purchase(product, [], goal).type_factor == 1.0  # half of the words
    nouns = lambda title: [word for word in title.split() if word != "red"]  # noqa: E731
    assert score_purchase(product, [], goal, nouns).type_factor == 0.0


def test_the_example_in_the_docstring():
    assert doctest.testmod(webshop_rewards).failed == 0
