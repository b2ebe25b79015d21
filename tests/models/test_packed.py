"""Packed tries and single sequences teach the same: loss, metrics and gradients; and no token of
one branch can influence another.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2sjax.batches import (
    PairSequences,
    Sequence,
    fill_rows,
    find_prefixes,
    pack_rows,
    pair_parts,
    plan_rows,
)
from w2sjax.losses import preference_loss, score_from_logits, sft_loss
from w2sjax.models import (
    Lora,
    ModelConfig,
    init_params,
    make_apply_fn,
    make_score_fn,
    tree_attention,
)
from w2sjax.train import init_state, make_train_step

CONFIG = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=24,
    compute_dtype="float32",
)
NUM_PAIRS = 40
LAYOUTS = {  # of the same 80 sequences: rows, tokens of a row, whether prefixes are shared
    "one row": (1, 320, True),
    "split": (4, 72, True),
    "none": (2 * NUM_PAIRS, 24, False),
}
PREFERENCES = {
    "dpo": {},
    "ipo": dict(loss_type="ipo"),
    "simpo": dict(loss_type="simpo", margin=0.2),
    "rpo": dict(sft_weight=0.5, label_smoothing=0.1),
    "per token": dict(length_normalized=True),
}
LOSSES = {"sft": sft_loss} | {
    name: functools.partial(preference_loss, beta=0.3, **options)
    for name, options in PREFERENCES.items()
}


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# ------------------------------------------------------------------------------------------ data


def make_trees(rng):
    """Tokens of trajectories, tree by tree."""

    def grow(stem, *levels):
        if not levels:
            return [stem]
        branches, most = levels[0]
        longer = [np.r_[stem, draw(rng.integers(0, most + 1))] for _ in range(branches)]
        return [leaf for one in longer for leaf in grow(one, *levels[1:])]

    def draw(length):
        return rng.integers(0, CONFIG.vocab_size, length)

    chain = draw(20)
    return [
        grow(draw(8), (64, 4)),  # some of no token, some equal
        grow(draw(6), (3, 5), (2, 5)),
        [chain],
        [draw(9), chain[:11], chain[:11], np.r_[chain[:11], draw(4)]],
    ]


def make_data(seed):
    """80 weighted sequences, and 40 pairs that part at a node and learn from it or before it on."""
    rng = np.random.default_rng(seed)
    trees = make_trees(rng)
    trajectories = [tokens for tree in trees for tokens in tree]
    trajectories += trajectories[: 2 * NUM_PAIRS - len(trajectories)]
    sequences = []
    for tokens in trajectories:
        weights = rng.choice([0, 1], len(tokens), p=[0.3, 0.7]) * rng.choice([0.3, 1, 2, 5])
        weights[0] = 0
        sequences.append(Sequence(tokens, weights))
    pairs = []
    while len(pairs) < NUM_PAIRS:
        tree = trees[rng.choice([0, 1, 3], p=[0.8, 0.1, 0.1])]
        sides = [tree[i] for i in rng.choice(len(tree), 2, replace=False)]
        if sides[0].tolist() == sides[1].tolist():
            continue
        start = rng.integers(1, min(map(len, sides)))
        pairs.append(
            PairSequences(*(Sequence(side, np.arange(len(side)) >= start) for side in sides))
        )
    return sequences, pairs


@functools.cache
def make_batches(seed, layout):
    """Loss's data → (batch, extras)."""
    sequences, pairs = make_data(seed)
    reference = np.random.default_rng(seed).normal(-9, 3, (NUM_PAIRS, 3)).astype(np.float32)
    sides, parts = pair_parts(pairs)
    tokens = [
        np.count_nonzero(sides[part.sequence].weights[part.start : part.stop]) for part in parts
    ]
    extras = {"ref_logps": reference, "path_tokens": np.reshape(tokens, (3, -1)).T}
    num_rows, row_length, share = LAYOUTS[layout]
    made = {}
    for name, data, paths in (("sequences", sequences, ()), ("pairs", sides, parts)):
        prefixes = find_prefixes(data, share=share)
        rows = plan_rows(prefixes, row_length) if share else [[i] for i in range(len(data))]
        shape = dict(num_rows=num_rows, row_length=row_length)
        batch = fill_rows(data, prefixes, rows, parts=paths, **shape)
        repeated = np.count_nonzero(batch.subtree_end) - prefixes.num_tokens
        assert (repeated > 0) == (layout == "split")
        assert share == (prefixes.num_tokens < sum(map(len, data)) / 2)
        made[name] = batch, (extras if paths else {})
    return made


# ----------------------------------------------------------------------------------------- model


@functools.cache
def make_params(config):
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    if config.lora is None:
        return params, {}
    awake = jax.tree.map(lambda leaf: leaf + 0.05, params["lora"])  # a zero B hides A's gradient
    return {"lora": awake}, {"base": params["base"]}


@functools.cache
def make_pullback(config, *, from_logits=False):
    """(batch, what comes from above) → log-probabilities and their pullback to what is trained."""
    score_fn = make_score_fn(config)
    if from_logits:
        plain = dataclasses.replace(config, attention="xla", remat="none", unroll=1)
        score_fn = score_from_logits(make_apply_fn(plain))
    trained, frozen = make_params(config)

    @jax.jit
    def pullback(batch, above):
        scores, pull = jax.vjp(lambda params: score_fn({**frozen, **params}, batch), trained)
        return scores, pull(above)[0]

    return lambda batch, above: pullback(
        batch.replace(path_token=None, path_id=None, path_weight=None), above
    )


@functools.cache
def make_slope(loss):
    """(log-probabilities, batch, extras) → gradient of the loss's sum, and what the loss says."""

    def summed(scores, batch, extras):
        output = LOSSES[loss](scores, batch, extras)
        return output.loss_sum, output

    return jax.jit(jax.grad(summed, has_aux=True))


@functools.cache
def learn(config, layout, seed, loss, *, from_logits=False):
    """Loss and metrics, and gradients."""
    pullback = make_pullback(config, from_logits=from_logits)
    batch, extras = make_batches(seed, layout)["sequences" if loss == "sft" else "pairs"]
    scores, _ = pullback(batch, np.zeros(batch.tokens.shape, np.float32))
    above, output = make_slope(loss)(scores, batch, extras)
    _, gradients = pullback(batch, above / output.denominator)
    metrics = {name: float(value[0]) for name, value in output.metrics.items()}
    metrics |= {"loss_sum": float(output.loss_sum), "denominator": float(output.denominator)}
    return metrics, jax.device_get(gradients)


def assert_same(one, other, tolerance=2e-5):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for (path, found), wanted in zip(
        jax.tree.leaves_with_path(one[1]), jax.tree.leaves(other[1]), strict=True
    ):
        scale = np.abs(wanted).max()
        assert scale > 1e-6, path
        error = np.abs(found - wanted).max() / scale
        assert error < tolerance, (jax.tree_util.keystr(path), error)


# ------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_layout_teaches_what_single_sequences_do(layout, loss):
    for seed in range(3):
        assert_same(
            learn(CONFIG, layout, seed, loss), learn(CONFIG, "none", seed, loss, from_logits=True)
        )


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            window=5,
            local_layers=(True, False),
            local_rope_theta=500.0,
            remat="full",
            tie_embeddings=False,
        ),
        dict(
            num_kv_heads=1,
            attention_softcap=2.0,
            logit_softcap=3.0,
            qk_norm=True,
            remat="dots",
            unroll=2,
        ),
        dict(lora=Lora(3, targets="."), remat="attention"),
    ],
    ids=["windows", "gemma", "lora"],
)
def test_every_kind_of_model_learns_from_tries_what_it_learns_from_sequences(changes):
    """Whatever is kept for the backward pass, and however layers loop."""
    config = dataclasses.replace(CONFIG, **changes)
    for loss in ("sft", "rpo"):
        assert_same(
            learn(config, "split", 0, loss), learn(config, "none", 0, loss, from_logits=True)
        )


def test_no_token_influences_another_tree_or_branch():
    """Bit for bit: scores outside of a token's subtree, and gradients of what lies there."""
    pullback = make_pullback(CONFIG)
    for seed in range(3):
        batch, _ = make_batches(seed, "split")["sequences"]
        rng = np.random.default_rng(seed)
        above = np.float32(rng.normal(size=batch.tokens.shape))
        scores, _ = pullback(batch, above)
        for _ in range(5):
            row = rng.integers(2)
            token = rng.integers(np.count_nonzero(batch.subtree_end[row]))
            below = np.zeros(batch.tokens.shape, bool)
            below[row, token : batch.subtree_end[row, token]] = True
            tokens = batch.tokens.copy()
            tokens[row, token] = (tokens[row, token] + 1) % CONFIG.vocab_size
            elsewhere = np.where(below, 0, above)
            changed, gradients = pullback(batch.replace(tokens=tokens), elsewhere)
            np.testing.assert_array_equal(changed[~below], scores[~below])
            assert (changed != scores)[below & (batch.loss_count > 0)].all()
            _, wanted = pullback(batch, elsewhere)
            jax.tree.map(np.testing.assert_array_equal, gradients, wanted)


def largest_array(step, state, batch, frozen=None):
    """Elements of the largest array in a compiled update."""
    text = step.lower(state, batch, {}, frozen).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def test_neither_scores_nor_logits_of_a_row_exist():
    """No array of the update is as large as [L, L] or [L, V]; in the plain form there are both."""
    length, config = 1024, dataclasses.replace(CONFIG, vocab_size=1500, num_layers=1)
    params, tx = init_params(config, jax.random.key(0)), optax.sgd(0.1)
    tokens = np.random.default_rng(0).integers(0, 1500, (2, 500))
    tokens[:, :100] = tokens[0, :100]
    batch = pack_rows([Sequence(one, np.arange(500) > 0) for one in tokens], length)
    found = []
    for score_fn in (
        make_score_fn(config),
        score_from_logits(make_apply_fn(dataclasses.replace(config, attention="xla"))),
    ):
        step = make_train_step(score_fn, sft_loss, tx)
        found.append(largest_array(step, init_state(params, tx), batch))
    assert found[0] < length * length / 2 and found[1] >= length * 1500


def make_matrix_work(monkeypatch):
    """Batch → FLOPs of the matrix products of attention in tiles, forward and backward: those of a
    round of each loop, times its rounds. XLA's own count takes a loop for one round of it."""
    products, of_a_round, rounds = [], [], []

    def product(equation, left, right):
        sizes = zip(equation.split("->")[0].replace(",", ""), left.shape + right.shape, strict=True)
        products.append(2 * math.prod(dict(sizes).values()))
        return jnp.einsum(equation, left, right)

    def loop(first, number, body, state):
        products.clear()
        jax.eval_shape(body, first, state)
        of_a_round.append(sum(products))
        rounds.append(number)
        return state

    @jax.jit
    def count(positions, ends):
        x = jnp.ones((*ends.shape, 1, 4))
        _, pull = jax.vjp(lambda x: tree_attention.attend_tree(x, x, x, positions, ends), x)
        pull(x)
        return jnp.stack(rounds)

    def matrix_work(batch):
        with monkeypatch.context() as patch:
            patch.setattr(tree_attention, "_product", product)
            patch.setattr(jax.lax, "fori_loop", loop)
            return int(count(batch.positions, batch.subtree_end) @ np.array(of_a_round))

    return matrix_work


def test_the_cost_of_attention_follows_what_is_visible(monkeypatch):
    """Rows of 1024 tokens, full: a path; short branches on a short trunk; short sequences."""
    length = 1024
    draw = functools.partial(np.random.default_rng(0).integers, 0, 2**15)
    trunk = draw(64)
    rows = {
        "path": [draw(length)],
        "branches": [np.r_[trunk, draw(32)] for _ in range(30)],
        "sequences": [draw(64) for _ in range(16)],
    }
    matrix_work, work, visible = make_matrix_work(monkeypatch), {}, {}
    for name, tokens in rows.items():
        batch = pack_rows([Sequence(one, np.arange(len(one)) > 0) for one in tokens], length)
        assert batch.tokens.shape == (1, length) and batch.subtree_end.all()
        work[name] = matrix_work(batch)
        visible[name] = (batch.positions + 1).sum()
    tiles = {"path": 16 * 17 / 2, "branches": 16 + 15, "sequences": 16}  # 16 blocks of 64 keys
    for name in rows:
        of_path = work[name] / work["path"]
        assert of_path == pytest.approx(tiles[name] / tiles["path"])
        assert of_path <= 2.1 * visible[name] / visible["path"]
    # Seven products of so many pairs each, and the softmax's sums as one feature more of a value.
    assert work["path"] == 2 * (7 * 4 + 1) * tiles["path"] * 64**2
