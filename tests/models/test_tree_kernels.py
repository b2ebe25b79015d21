"""Laws of block-sparse tree attention: equal to the dense form, and blind to unseen blocks."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.models import attention
from w2sjax.models.tree_blocks import block_table
from w2sjax.models.tree_kernels import default_block, tree_attention

LENGTH, BLOCK = 100, 16  # the last block hangs over the end of the row
PLAIN = dict(window=None, softcap=None)

# the interpreter's programs are run a few times only: quick to compile is quicker
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tree_row(trees, length):
    """positions and subtree_end of a row of trees, each (tokens, [subtrees below them])."""
    positions, ends = np.zeros(length, np.int32), np.zeros(length, np.int32)

    def lay(tree, start, depth):
        size, children = tree
        end = start + size
        for child in children:
            end = lay(child, end, depth + size)
        positions[start : start + size] = depth + np.arange(size)
        ends[start : start + size] = end
        return end

    start = 0
    for tree in trees:
        start = lay(tree, start, 0)
    assert start <= length
    return positions, ends


def random_tree(rng, budget):
    """A tree of at most `budget` tokens, in segments of 1 to 12."""
    size = min(budget, int(rng.integers(1, 13)))
    budget, children = budget - size, []
    while budget > 0 and rng.random() < 0.75:
        child = random_tree(rng, budget)
        children.append(child)
        budget -= tokens_of(child)
    return size, children


def tokens_of(tree):
    return tree[0] + sum(map(tokens_of, tree[1]))


def random_row(rng, length):
    """Trees one after another, then padding."""
    trees, left = [], length - int(rng.integers(0, length // 3))
    while left > 0:
        trees.append(random_tree(rng, left))
        left -= tokens_of(trees[-1])
    return tree_row(trees, length)


def rows():
    """Random trees; one path that fills its row; a trunk with 64 branches; nothing but padding."""
    rng = np.random.default_rng(0)
    made = [
        random_row(rng, LENGTH),
        tree_row([(LENGTH, [])], LENGTH),
        tree_row([(20, [(1, [])] * 63 + [(9, [])])], LENGTH),
        tree_row([], LENGTH),
    ]
    return tuple(jnp.asarray(np.stack(x)) for x in zip(*made, strict=True))


def arrays(num_rows, heads, groups, width, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = [(num_rows, LENGTH, x, width) for x in (heads, groups, groups, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(quick_jit, static_argnames=("kind", "window", "softcap"))
def fused(query, key, value, positions, ends, towards, *, kind, window, softcap):
    """Result, and gradients of its product with `towards`."""

    def attend(*inputs):
        scale = query.shape[-1] ** -0.5
        options = dict(window=window, softcap=softcap, scale=scale, block=BLOCK)
        mixed = tree_attention(*inputs, positions, ends, kind=kind, interpret=True, **options)
        return (mixed.astype(jnp.float32) * towards).sum(), mixed

    return jax.grad(attend, (0, 1, 2), has_aux=True)(query, key, value)[::-1]


@functools.partial(quick_jit, static_argnames=("window", "softcap"))
def dense(query, key, value, positions, ends, towards, *, window, softcap):
    mask = attention.subtree_mask(ends)
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None, :] < window

    def attend(query, key, value):
        keys, values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
        mixed = attention.attend(query, keys, values, mask, softcap=softcap)
        return (mixed.astype(jnp.float32) * towards).sum(), mixed

    return jax.grad(attend, (0, 1, 2), has_aux=True)(query, key, value)[::-1]


# --- equal to the dense form --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "window", "softcap"),
    [(2, 2, 16, None, None), (6, 2, 24, 7, 2.0), (4, 1, 80, 60, None)],
    ids=["plain", "short-window-softcap-3-to-1-width-24", "long-window-4-to-1-width-80"],
)
def test_result_and_gradients_equal_the_dense_form(kind, heads, groups, width, window, softcap):
    positions, ends = rows()
    query, key, value, towards = arrays(len(ends), heads, groups, width)
    options = dict(window=window, softcap=softcap)
    got = fused(query, key, value, positions, ends, towards, kind=kind, **options)
    wanted = dense(query, key, value, positions, ends, towards, **options)
    chex.assert_trees_all_close(got, wanted, atol=1e-5, rtol=1e-5)
    padding = np.asarray(ends) == 0
    for array in (got[0], *got[1]):
        assert not np.asarray(array)[padding].any()


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_bfloat16_is_close_to_the_dense_form_in_float32(kind):
    positions, ends = rows()
    *inputs, towards = arrays(len(ends), 2, 2, 16, jnp.bfloat16)
    got = fused(*inputs, positions, ends, towards, kind=kind, **PLAIN)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    wanted = dense(*(x.astype(jnp.float32) for x in inputs), positions, ends, towards, **PLAIN)
    to_float32 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    chex.assert_trees_all_close(to_float32(got), wanted, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_blocks_that_may_not_be_read_may_hold_anything(kind):
    """Trunk in blocks 0–1, a branch in 2–3, a branch in 4 and another tree in 5."""
    row = tree_row([(32, [(32, []), (16, [])]), (16, [])], LENGTH)
    positions, ends = (jnp.asarray(np.stack([x] * 4)) for x in row)
    query, key, value, towards = arrays(4, 2, 2, 16)
    clean = fused(query, key, value, positions, ends, towards, kind=kind, **PLAIN)
    poison = [x.at[:, 32:64].set(jnp.nan) for x in (query, key, value)]
    out, by_inputs = fused(*poison, positions, ends, towards, kind=kind, **PLAIN)
    assert np.isnan(out[:, 32:64]).all()
    for got, wanted in ((out, clean[0]), (by_inputs[0], clean[1][0])):
        np.testing.assert_array_equal(got[:, :32], wanted[:, :32])
        np.testing.assert_array_equal(got[:, 64:], wanted[:, 64:])
    for got, wanted in zip(by_inputs[1:], clean[1][1:], strict=True):
        np.testing.assert_array_equal(got[:, 64:], wanted[:, 64:])


def test_a_given_table_must_be_of_these_rows():
    positions, ends = rows()
    query, key, value, towards = arrays(len(ends), 2, 2, 16)

    def attend(table, **options):
        options = dict(scale=0.25, interpret=True) | options
        return tree_attention(query, key, value, positions, ends, table=table, **options)

    table = block_table(positions, ends, block=BLOCK, window=None)
    alone, _ = fused(query, key, value, positions, ends, towards, kind="gpu", **PLAIN)
    np.testing.assert_array_equal(quick_jit(lambda: attend(table, kind="gpu"))(), alone)
    with pytest.raises(ValueError, match=r"\(16, None\).*\(16, 5\)"):
        attend(table, kind="gpu", window=5)
    with pytest.raises(ValueError, match=r"\(16, None\).*\(32, None\)"):
        attend(table, kind="tpu", block=32)
    with pytest.raises(ValueError, match="not for 'cpu'"):
        attend(None, kind="cpu")


# --- the table ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("block", "window"))
def table_of(positions, ends, block, window):
    return block_table(positions, ends, block=block, window=window)


def brute_force(positions, ends, block, window):
    """Whether any and whether every pair of tokens of two blocks may attend, bool [n, n] each."""
    index = np.arange(len(ends))
    visible = (index[None] <= index[:, None]) & (index[:, None] < ends[None])
    if window is not None:
        visible &= positions[:, None] - positions[None] < window
    blocks = -(-len(ends) // block)
    padded = np.zeros((blocks * block,) * 2, bool)
    padded[: len(ends), : len(ends)] = visible
    pairs = padded.reshape(blocks, block, blocks, block).swapaxes(1, 2)
    return pairs.any((2, 3)), pairs.all((2, 3))


def listed(lists):
    """Pairs (seen, whole), bool [n, n], of a `BlockList` of one row; checks that none repeats."""
    blocks, whole, count = (np.asarray(x[0]) for x in (lists.blocks, lists.whole, lists.count))
    seen, wholly = (np.zeros(blocks.shape, bool) for _ in range(2))
    for i, row in enumerate(blocks):
        assert len(set(row[: count[i]])) == count[i]
        assert count[i] == 0 or (row[count[i] :] == row[count[i] - 1]).all()
        seen[i, row[: count[i]]] = True
        wholly[i, row[: whole[i]]] = True
    return seen, wholly


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 9, 40]), st.booleans())
def test_table_equals_brute_force(seed, window, is_tree):
    rng = np.random.default_rng(seed)
    positions, ends = random_row(rng, 60)
    if not is_tree:  # the rule says what any numbers mean
        positions, ends = rng.integers(0, 30, 60), rng.integers(0, 61, 60)
    table = table_of(positions[None], ends[None], 8, window)
    seen, whole = listed(table.keys)
    chex.assert_trees_all_equal(listed(table.queries), (seen.T, whole.T))
    any_pair, every_pair = brute_force(positions, ends, 8, window)
    assert (seen >= any_pair).all() and (whole <= every_pair).all()
    if window is None:
        np.testing.assert_array_equal(seen, any_pair)
        # the diagonal is masked anyway
        np.testing.assert_array_equal(whole, np.tril(every_pair, -1))


def test_window_leaves_out_blocks_of_a_path():
    positions, ends = (x[None] for x in tree_row([(60, [])], 60))
    for window in (1, 9, 40):
        table = table_of(positions, ends, 8, window)
        wanted, _ = brute_force(positions[0], ends[0], 8, window)
        np.testing.assert_array_equal(listed(table.keys)[0], wanted)


# --- what the compilers of the devices are given ------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("kind", "platform", "call"),
    [("gpu", "cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu", "tpu_custom_call")],
)
def test_kernels_lower_for_their_devices(kind, platform, call, dtype):
    """Checks shapes of blocks and that each operation has a rule; no device compiler runs."""

    def lowered(length, heads, groups, width, **options):
        query = jax.ShapeDtypeStruct((2, length, heads, width), dtype)
        key = jax.ShapeDtypeStruct((2, length, groups, width), dtype)
        places = jax.ShapeDtypeStruct((2, length), jnp.int32)

        def loss(*inputs):
            mixed = tree_attention(*inputs, kind=kind, scale=width**-0.5, **options)
            return mixed.astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, places, places)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    # the result, the gradient by queries and those by keys and values
    assert lowered(8192, 32, 8, 128).count(f"@{call}") == 3
    assert lowered(1000, 6, 2, 80, window=512, softcap=30.0).count(f"@{call}") == 3


@pytest.mark.parametrize(
    ("kind", "blocks", "message"),
    [("gpu", (8, 48), "power of two >= 16"), ("tpu", (8, 200), "multiple of 16")],
)
def test_blocks_that_a_device_cannot_do_are_refused(kind, blocks, message):
    query = jnp.zeros((1, 64, 2, 16))
    places = jnp.zeros((1, 64), jnp.int32)
    for block in blocks:
        with pytest.raises(ValueError, match=message):
            tree_attention(query, query, query, places, places, kind=kind, scale=1.0, block=block)


def test_default_blocks_fit_the_devices():
    for dtype in ("bfloat16", "float32"):
        for width in (16, 80, 128, 256):
            for group in (1, 3, 4, 8, 16):
                options = dict(dtype=jnp.dtype(dtype), width=width, group=group)
                assert default_block("gpu", **options) in (16, 32, 64)
                assert default_block("tpu", **options) in (64, 128, 256, 512)


# --- several devices ----------------------------------------------------------------------------


def test_four_devices_equal_one():
    flags = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
        check=True,
    )


def _on_four_devices():
    assert jax.device_count() == 4
    positions, ends = rows()
    query, key, value, towards = arrays(len(ends), 4, 2, 16)

    def loss(query, key, value, split):
        options = dict(kind="gpu", scale=0.3, block=BLOCK, split=split, interpret=True)
        return (tree_attention(query, key, value, positions, ends, **options) * towards).sum()

    gradients = quick_jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    alone = gradients(query, key, value, None)
    axes = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=axes)):
        spread = gradients(query, key, value, ("data", "tensor"))
    assert len(spread[0].sharding.device_set) == 4
    chex.assert_trees_all_close(spread, alone, atol=1e-6)


if __name__ == "__main__":
    _on_four_devices()
