"""An NNX module trains as any other apply_fn does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from w2sjax.batches import Sequence, sft_batches
from w2sjax.losses import score_from_logits, sft_loss
from w2sjax.models.attention import subtree_mask
from w2sjax.models.nnx_adapter import from_nnx
from w2sjax.train import init_state, make_train_step


class Tiny(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(13, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 13, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # holds a random stream, which is no parameter

    def __call__(self, tokens, mask):
        x = self.embed(tokens)
        for layer in self.layers:
            seen = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
            x = x + jnp.tanh(layer(jnp.einsum("sij,sjd->sid", seen, x)))
        return self.head(x)


def call(module, tokens, positions, subtree_end):
    del positions
    if subtree_end is None:
        subtree_end = jnp.full(tokens.shape, tokens.shape[1])
    return module(tokens, subtree_mask(subtree_end))


def test_params_are_the_modules_and_results_too():
    module = Tiny(nnx.Rngs(0))
    apply_fn, params = from_nnx(module, call)
    assert set(params) == {"embed", "layers", "head"}
    tokens = np.random.default_rng(0).integers(0, 13, (2, 7))
    expected = module(tokens, subtree_mask(jnp.full((2, 7), 7)))
    np.testing.assert_allclose(jax.jit(apply_fn)(params, tokens), expected, atol=1e-6)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert np.abs(apply_fn(doubled, tokens) - expected).max() > 0.1
    np.testing.assert_allclose(apply_fn(params, tokens), expected, atol=1e-6)  # nothing stuck


def test_it_trains():
    apply_fn, params = from_nnx(Tiny(nnx.Rngs(0)), call)
    tx = optax.adam(1e-2)
    rng = np.random.default_rng(0)
    sequences = [
        Sequence(rng.integers(0, 13, 9, np.int32), np.r_[0, np.ones(8)].astype(np.float32))
        for _ in range(4)
    ]
    loader = sft_batches(sequences, sequences_per_batch=4, total_steps=30, seed=0)
    step = make_train_step(score_from_logits(apply_fn), sft_loss, tx)
    state = init_state(params, tx)
    losses = []
    for number in range(30):
        loaded = loader.batch(number)
        state, metrics = step(state, loaded.batch, loaded.extras)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match=r"Dropout has no nnx\.Param"):
        from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), call)
