"""Keys are equal exactly when the text is."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import pytest

from w2sjax import trees

A, B = ("open box", "It is empty."), ("open box", "A mug is in it.")
C, D = ("kick box", "It is empty."), ("wait", "")


@pytest.mark.parametrize(
    "merge_on, equal",
    [
        ("action", {(A, B)}),
        ("action_observation", set()),
        ("observation_history", {(A, C)}),
    ],
)
def test_what_merges(merge_on, equal):
    keys = trees.intern_steps([[[A], [B], [C], [D]]], merge_on=merge_on).step_keys[0, :, 0]
    steps = [A, B, C, D]
    for i in range(4):
        for j in range(i):
            same = (steps[j], steps[i]) in equal
            assert (keys[i] == keys[j]) == same


def test_joined_text_that_is_equal_does_not_collide():
    keys = trees.intern_steps([[[("ab", "c")], [("a", "bc")]]]).step_keys
    assert keys[0, 0, 0] != keys[0, 1, 0]


def test_padding_lengths_and_masks():
    keys = trees.intern_steps([[[A, B], []], [[C]], []], num_rollouts=3, num_steps=4)
    assert keys.step_keys.shape == (3, 3, 4)
    assert keys.lengths.tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert keys.mask.tolist() == [[True, True, False], [True, False, False], [False] * 3]


def test_an_interner_goes_on_over_calls():
    interner = trees.StepInterner()
    first = trees.intern_steps([[[A, B]]], interner=interner)
    second = trees.intern_steps([[[B, D]]], interner=interner)
    assert first.step_keys[0, 0, 1] == second.step_keys[0, 0, 0]
    assert len(interner) == 3


def test_too_small_sizes_are_named():
    with pytest.raises(ValueError, match=r"tasks\[1\] has 2 trajectories, but num_rollouts is 1"):
        trees.intern_steps([[[A]], [[A], [B]]], num_rollouts=1)
    with pytest.raises(ValueError, match=r"tasks\[1\] has a trajectory of 2 steps"):
        trees.intern_steps([[[A]], [[A, B]]], num_steps=1)
    with pytest.raises(ValueError, match="merge_on: got 'state'"):
        trees.StepInterner("state")


def test_drawing():
    tree = jax.jit(trees.build_tree, static_argnames="max_nodes")(
        jnp.array([[0, 1], [0, 2]]), jnp.array([2, 2]), jnp.ones(2), max_nodes=4
    )
    assert trees.draw_tree(tree, str) == "0\n└─ 1\n   ├─ 2\n   └─ 3"
    assert trees.draw_tree(tree, str, max_nodes=2).endswith("… 2 more nodes")


@pytest.mark.parametrize("name", ["build", "keys", "compress"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"w2sjax.trees.{name}")
    assert doctest.testmod(module).failed == 0
