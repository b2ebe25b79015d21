"""How one token is drawn from logits: temperature, then top-k, top-p and min-p, by inversion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Filters(NamedTuple):
    """What tokens are drawn with, as data: one compiled program serves all values."""

    temperature: chex.Numeric  # float32, divides the logits; 0 takes the most likely token
    top_k: chex.Numeric  # int32, of the most likely tokens; V or more leaves all
    top_p: chex.Numeric  # float32, least mass of the most likely tokens that stay; 1 leaves all
    min_p: chex.Numeric  # float32, least probability, as a share of the highest; 0 leaves all


LEVELS = 4  # random numbers per token; see `invert`


@functools.partial(jax.jit, static_argnames="count")
def uniforms(keys: chex.PRNGKey, *, count: int) -> chex.Array:
    """The random numbers of a turn: float32 [S, count, LEVELS], those of token j from
    `fold_in(key, j)`.

    On their own, so that they are compiled once for all policies and cache lengths.
    """
    step_keys = jax.vmap(
        lambda key: jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.arange(count))
    )(keys)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (LEVELS,))))(step_keys)


def draw(
    logits: chex.Array, uniform: chex.Array, filters: Filters
) -> tuple[chex.Array, chex.Array]:
    """Draws one token per row.

    Filters are applied one after the other, each on what the one before it left, as transformers
    and vLLM do. A few random numbers per row decide (the Gumbel trick would need V of them).

    Args:
      logits: float32 [S, V].
      uniform: float32 [S, LEVELS], in [0, 1).
      filters: which tokens may be drawn.

    Returns:
      tokens int32 [S]; their log-probabilities without temperature and filters, float32 [S], nats.
    """
    vocab = logits.shape[1]

    def sample() -> chex.Array:
        probs = jax.nn.softmax(logits / filters.temperature, axis=-1)
        steps = (
            (filters.top_k < vocab, lambda probs: keep_top_k(probs, filters.top_k)),
            (filters.top_p < 1.0, lambda probs: keep_top_p(probs, filters.top_p)),
            (filters.min_p > 0.0, lambda probs: keep_min_p(probs, filters.min_p)),
        )
        for wanted, keep in steps:
            probs = jax.lax.cond(wanted, keep, lambda probs: probs, probs)
        return invert(probs, uniform)

    def take_best() -> chex.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    tokens = jax.lax.cond(filters.temperature == 0.0, take_best, sample)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=1)
    return tokens, logps[:, 0]


def keep_top_k(probs: chex.Array, top_k: chex.Numeric) -> chex.Array:
    """Zeroes all but the `top_k` most likely tokens, and those as likely as the last of them."""
    return _keep(probs, lambda kept: kept.sum(axis=-1) >= top_k)


def keep_top_p(probs: chex.Array, top_p: chex.Numeric) -> chex.Array:
    """Zeroes all but the smallest most likely set with at least `top_p` of the mass, and tokens as
    likely as the last one kept (arXiv 1904.09751)."""
    wanted = top_p * probs.sum(axis=-1)
    return _keep(probs, lambda kept: jnp.where(kept, probs, 0.0).sum(axis=-1) >= wanted)


def keep_min_p(probs: chex.Array, min_p: chex.Numeric) -> chex.Array:
    """Zeroes tokens that are less likely than `min_p` times the most likely (arXiv 2407.01082)."""
    return jnp.where(probs >= min_p * probs.max(axis=-1, keepdims=True), probs, 0.0)


def _keep(probs: chex.Array, enough: Callable[[chex.Array], chex.Array]) -> chex.Array:
    """Zeroes what is below the largest threshold that leaves enough.

    Float bits of non-negative numbers sort like integers, so bisection over 31 bits finds that
    threshold exactly and without sorting the vocabulary.

    Args:
      probs: float32 [S, V], not negative.
      enough: (kept bool [S, V]) → bool [S], true of all tokens.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(i: chex.Array, threshold: chex.Array) -> chex.Array:
        trial = threshold | (jnp.int32(1) << (30 - i))
        return jnp.where(enough(bits >= trial[:, None]), trial, threshold)

    threshold = jax.lax.fori_loop(0, 31, halve, jnp.zeros(probs.shape[0], jnp.int32))
    return jnp.where(bits >= threshold[:, None], probs, 0.0)


def invert(probs: chex.Array, uniform: chex.Array) -> chex.Array:
    """Draws by inversion, level by level: a block of tokens, a block in that, …, a token.

    At each level the choice is where the cumulative distribution of its few candidates passes the
    level's own random number. So a draw hardly depends on rounding: it changes where one of those
    numbers lies at one of D · V^(1/D) boundaries, rather than one number at one of V.

    Args:
      probs: float32 [S, V], not negative; need not be normalised.
      uniform: float32 [S, D], in [0, 1).

    Returns:
      int32 [S].
    """
    slots, vocab = probs.shape
    levels = uniform.shape[1]
    size = next(size for size in range(1, vocab + 1) if size**levels >= vocab)
    leaves = jnp.pad(probs, ((0, 0), (0, size**levels - vocab)))
    tree = [leaves.reshape(slots, -1, size)]  # [S, blocks, candidates in each], leaves first
    while len(tree) < levels:
        tree.append(tree[-1].sum(axis=-1).reshape(slots, -1, size))
    index = jnp.zeros(slots, jnp.int32)
    for level, weights in enumerate(reversed(tree)):
        candidates = jnp.take_along_axis(weights, index[:, None, None], axis=1)[:, 0]
        index = index * size + _first_hit(candidates, uniform[:, level])
    return index


def _first_hit(weights: chex.Array, uniform: chex.Array) -> chex.Array:
    """Where the running sum of the weights first exceeds that share of their whole sum.

    Args:
      weights: float32 [S, n], not negative.
      uniform: float32 [S], in [0, 1).

    Returns:
      int32 [S], always of a positive weight if there is one.
    """
    index = jnp.arange(weights.shape[1], dtype=jnp.int32)
    until = index[None, :] <= index[:, None]
    sums = jnp.where(until, weights[:, None, :], 0.0).sum(axis=-1)  # [S, n]
    hit = (sums > (uniform * sums[:, -1])[:, None]) & (weights > 0.0)
    # Rounding may put the target at the last sum: then the largest weight stands in.
    chosen = jnp.where(hit.any(axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(weights, axis=-1))
    return chosen.astype(jnp.int32)
