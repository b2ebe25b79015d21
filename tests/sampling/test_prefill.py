"""Long chunks computed apart give the same episodes as one padded step for all slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2sjax.models import ModelConfig, init_params, make_policy
from w2sjax.sampling import SamplerSettings, make_sampler, prefill
from w2sjax.types import Policy

CONFIG = ModelConfig(
    vocab_size=40, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16,
    compute_dtype="float32",
)  # fmt: skip
NUM_SLOTS = 10
SETTINGS = SamplerSettings(max_length=120, max_new_tokens=3, stop_ids=(0,))


@functools.cache
def _policy():
    return make_policy(CONFIG)


@functools.cache
def _slots_last():
    """The same model with the slot axis of its caches at the end."""
    inner = _policy()

    def move(cache, source, target):
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, source, target), cache)

    def decode_fn(params, cache, *rest):
        logits, cache = inner.decode_fn(params, move(cache, -1, 0), *rest)
        return logits, move(cache, 0, -1)

    return Policy(
        inner.apply_fn,
        inner.score_fn,
        lambda *shape: move(inner.init_cache(*shape), 0, -1),
        decode_fn,
        None,
    )


def _play(policy, turns=3):
    """A few turns with chunks of all lengths; slot 1 never fits, slot 2 idles."""
    sampler = make_sampler(policy, SETTINGS, num_slots=NUM_SLOTS)
    params = init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    state, results = sampler.init(), []
    for turn in range(turns):
        length = rng.integers(1, 32, NUM_SLOTS)
        length[1:4] = 120, 0, 17
        chunk = rng.integers(1, 40, (NUM_SLOTS, 128)).astype(np.int32)
        reset = rng.random(NUM_SLOTS) < (1.0 if turn == 0 else 0.2)
        keys = jax.random.split(jax.random.key(turn), NUM_SLOTS)
        state, result = sampler.turn(params, state, chunk, length, reset, keys)
        results.append((jax.device_get(result), np.asarray(state.length)))
    return results


@pytest.fixture(scope="module")
def padded():
    """What one padded step for all slots gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "TAIL", 1000)
        return _play(_policy())


@pytest.mark.parametrize("policy", [_policy, _slots_last])
def test_results_equal_those_of_one_padded_step(policy, padded):
    for (result, length), (wanted, wanted_length) in zip(_play(policy()), padded, strict=True):
        assert np.array_equal(length, wanted_length)
        assert np.array_equal(result.tokens, wanted.tokens)
        assert np.array_equal(result.length, wanted.length)
        assert np.array_equal(result.full, wanted.full)
        np.testing.assert_allclose(result.logp, wanted.logp, atol=1e-4)
    assert wanted.full[1]
    assert (wanted.length > 0).sum() >= 6


def test_only_tails_are_left_and_the_input_is_not_changed():
    policy = _policy()
    cache = policy.init_cache(NUM_SLOTS, 64)
    length = np.arange(NUM_SLOTS, dtype=np.int32)
    pending = np.where(length % 2, 7, -1).astype(np.int32)
    chunk = np.arange(NUM_SLOTS * 32, dtype=np.int32).reshape(NUM_SLOTS, 32) % 40
    count = np.asarray([16, 17, 32, 30, 0, 1, 20, 20, 20, 20])
    fits = np.arange(NUM_SLOTS) != 9
    before = [array.copy() for array in (length, pending, chunk, count)]
    rest, left = prefill.fill_heads(
        init_params(CONFIG, jax.random.key(0)), cache, length, pending, chunk, count, fits,
        policy=policy,
    )  # fmt: skip
    assert all(map(np.array_equal, before, (length, pending, chunk, count)))
    long = fits & (count > prefill.TAIL)
    assert rest.chunk.shape == (NUM_SLOTS, prefill.TAIL)
    assert np.array_equal(left, np.where(long, prefill.TAIL, count))
    assert np.array_equal(rest.length - length, np.where(long, count - prefill.TAIL, 0))
    assert np.array_equal(rest.pending, np.where(long, -1, pending))
    for slot in range(NUM_SLOTS):
        start = count[slot] - prefill.TAIL if long[slot] else 0
        assert np.array_equal(rest.chunk[slot], chunk[slot, start : start + prefill.TAIL])
    # A slot is written exactly where its head and its pending token belong.
    written = np.asarray(rest.cache[0][1]).any(axis=(1, 3))
    for slot in range(NUM_SLOTS):
        first = length[slot] - (pending[slot] >= 0)
        where = np.arange(64)
        wanted = (where >= first) & (where < rest.length[slot]) & long[slot]
        assert np.array_equal(written[slot], wanted), slot
