"""Batched token sampling with a KV cache, pure and jitted; a slot holds one running episode.

A turn appends a chunk of given tokens (the prompt, or the next observation) to each slot's context
and samples an answer: until a stop token, `max_new_tokens`, or the end of the context. A slot keeps
its cache from turn to turn, so no token is ever computed twice.

What is in a slot's context after a turn: every chunk token and every sampled token, stop token
included. (The last sampled token is only known, not yet computed: it stands in `SlotState.pending`
and enters the cache in front of the next chunk. Callers need not care.) An answer without a stop
token leaves the context as it is: the caller may append whatever comes next, an end-of-turn token
first.

The token at step j of a turn is drawn with `fold_in(keys[slot], j)` from that slot's logits alone:
an episode depends neither on its slot nor on its neighbours nor on how many slots there are, beyond
float rounding of the logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from w2sjax.sampling.prefill import fill_heads
from w2sjax.types import Policy

_MIN_CACHE_LENGTH = 256  # caches grow from here in steps, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """What a sampler does at each turn.

    Attributes:
      max_length: longest context of a slot, in tokens, prompt and answers together.
      max_new_tokens: most tokens sampled in one turn, stop token included.
      stop_ids: tokens that end an answer; they belong to it.
      temperature: divides the logits; 0 takes the most likely token.
      top_p: draw only from the smallest set of most likely tokens (after temperature) whose
        probabilities sum to at least this (arXiv 1904.09751); 1 draws from all.
    """

    max_length: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(int(token) for token in self.stop_ids))
        for field in ("max_length", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"SamplerSettings.{field} must be >= 1, got {getattr(self, field)}"
                )
        if not self.stop_ids:
            raise ValueError("SamplerSettings.stop_ids is empty: no answer could ever end")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"SamplerSettings.temperature must be >= 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"SamplerSettings.top_p must be in (0, 1], got {self.top_p}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("cache", "length", "pending"),
    meta_fields=("cache_length",),
)
@dataclasses.dataclass(frozen=True)
class SlotState:
    """All slots between two turns; `turn` consumes it (its buffers are donated)."""

    cache: Any  # the policy's cache
    length: chex.Array  # int32 [S], tokens in the context, a pending one included
    pending: chex.Array  # int32 [S], last sampled token, not yet in the cache; −1 for none
    cache_length: int  # positions that `cache` holds at present


@chex.dataclass(frozen=True)
class TurnResult:
    """What was sampled in one turn; idle slots have length 0 and all flags False."""

    tokens: chex.Array  # int32 [S, max_new_tokens], 0 at and past `length`
    length: chex.Array  # int32 [S], sampled tokens, stop token included
    logp: chex.Array  # float32 [S], nats: sum of log-probabilities without temperature and top-p
    truncated: chex.Array  # bool [S], the answer ended without a stop token
    full: chex.Array  # bool [S], it did so because the context is full, or the chunk did not fit


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`init` makes an empty state, `turn` plays one turn in all slots; see `make_sampler`."""

    settings: SamplerSettings
    num_slots: int
    init: Callable[[], SlotState]
    turn: Callable[..., tuple[SlotState, TurnResult]]


def _nucleus(probs: chex.Array, top_p: chex.Numeric) -> chex.Array:
    """Zeroes all but the smallest most likely set with at least `top_p` of the mass.

    The set is {p >= t} for the largest t that leaves enough mass. Float bits of non-negative
    numbers sort like integers, so bisection over 31 bits finds that t exactly and without sorting
    the vocabulary. Tokens as likely as the last one kept are kept too.

    Args:
      probs: float32 [S, V], rows sum to 1.
      top_p: in (0, 1).

    Returns:
      float32 [S, V], not normalised.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(i: chex.Array, threshold: chex.Array) -> chex.Array:
        trial = threshold | (jnp.int32(1) << (30 - i))
        mass = jnp.where(bits >= trial[:, None], probs, 0.0).sum(axis=-1)
        return jnp.where(mass >= top_p, trial, threshold)

    threshold = jax.lax.fori_loop(0, 31, halve, jnp.zeros(probs.shape[0], jnp.int32))
    return jnp.where(bits >= threshold[:, None], probs, 0.0)


def _first_hit(weights: chex.Array, target: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Where the running sum of the weights first exceeds the target.

    Args:
      weights: float32 [S, n], not negative.
      target: float32 [S].

    Returns:
      index int32 [S], always of a positive weight if there is one; the sum before it, float32 [S].
    """
    index = jnp.arange(weights.shape[1])
    earlier = index[None, :] < index[:, None]
    before = jnp.where(earlier, weights[:, None, :], 0.0).sum(axis=-1)  # [S, n]
    hit = (before + weights > target[:, None]) & (weights > 0.0)
    # Rounding may put the target an ulp past the last sum: then the largest weight stands in.
    first = jnp.where(hit.any(axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(weights, axis=-1))
    return first, jnp.take_along_axis(before, first[:, None], axis=1)[:, 0]


def _invert(probs: chex.Array, uniform: chex.Array) -> chex.Array:
    """Draws by inversion: the token at which the cumulative distribution passes `uniform`.

    The vocabulary is cut into about sqrt(V) blocks: first the block is found, then the token in it.

    Args:
      probs: float32 [S, V], not negative; need not be normalised.
      uniform: float32 [S], in [0, 1).

    Returns:
      int32 [S].
    """
    slots, vocab = probs.shape
    size = math.isqrt(vocab - 1) + 1
    blocks = jnp.pad(probs, ((0, 0), (0, -vocab % size))).reshape(slots, -1, size)
    sums = blocks.sum(axis=-1)
    target = uniform * sums.sum(axis=-1)
    block, before = _first_hit(sums, target)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    offset, _ = _first_hit(chosen, target - before)
    return block * size + offset


@functools.partial(jax.jit, static_argnames="count")
def _uniforms(keys: chex.PRNGKey, *, count: int) -> chex.Array:
    """The random numbers of a turn: float32 [S, count], number j from `fold_in(key, j)`.

    On their own, so that they are compiled once for all policies and cache lengths.
    """
    step_keys = jax.vmap(
        lambda key: jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.arange(count))
    )(keys)
    return jax.vmap(jax.vmap(jax.random.uniform))(step_keys)


def _draw(
    logits: chex.Array, uniform: chex.Array, temperature: chex.Numeric, top_p: chex.Numeric
) -> tuple[chex.Array, chex.Array]:
    """Draws one token per slot: (tokens int32 [S], untempered log-probabilities float32 [S]).

    One random number per slot, `uniform` float32 [S], decides (the Gumbel trick would need V).
    Temperature and top-p are data, so that one compiled program serves all of them.
    """

    def sample():
        probs = jax.nn.softmax(logits / temperature, axis=-1)
        probs = jax.lax.cond(top_p < 1.0, lambda: _nucleus(probs, top_p), lambda: probs)
        return _invert(probs, uniform).astype(jnp.int32)

    def take_best():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    tokens = jax.lax.cond(temperature == 0.0, take_best, sample)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=1)
    return tokens, logp[:, 0]


@chex.dataclass(frozen=True)
class _Progress:
    """The decode loop's carry, apart from the cache."""

    step: chex.Array  # int32 [], tokens drawn so far by slots that are still going
    going: chex.Array  # bool [S]
    last: chex.Array  # int32 [S], token drawn last
    context: chex.Array  # int32 [S], tokens in the context
    result: TurnResult


def _advance(
    progress: _Progress,
    drawn: chex.Array,
    logp: chex.Array,
    *,
    max_length: int,
    stop_ids: tuple[int, ...],
) -> _Progress:
    """Adds a drawn token to every slot that is still going."""
    going, before = progress.going, progress.result
    max_new_tokens = before.tokens.shape[1]
    context = progress.context + going
    stopped = going & (drawn[:, None] == np.asarray(stop_ids, np.int32)).any(axis=-1)
    full = going & ~stopped & (context >= max_length)
    goes_on = going & ~stopped & ~full & (progress.step + 1 < max_new_tokens)
    result = TurnResult(
        tokens=before.tokens.at[:, progress.step].set(jnp.where(going, drawn, 0)),
        length=before.length + going,
        logp=before.logp + jnp.where(going, logp, 0.0),
        truncated=before.truncated | (going & ~stopped & ~goes_on),
        full=before.full | full,
    )
    return _Progress(
        step=progress.step + 1,
        going=goes_on,
        last=jnp.where(going, drawn, progress.last),
        context=context,
        result=result,
    )


@functools.partial(jax.jit, static_argnames=("policy", "max_length"), donate_argnames="cache")
def _append(
    params, cache, length, pending, chunk, chunk_length, *, policy: Policy, max_length: int
):
    """Writes each slot's pending token and chunk.

    Returns the cache, the logits [S, V] after what was written, the context's length [S], the
    pending token [S], and which slots play this turn and which were refused for want of room [S].
    """
    wanted = chunk_length > 0
    played = wanted & (length + chunk_length < max_length)
    has_pending = pending >= 0
    tokens = jnp.where(
        has_pending[:, None],
        jnp.concatenate([jnp.maximum(pending, 0)[:, None], chunk], axis=1),
        jnp.concatenate([chunk, jnp.zeros_like(chunk[:, :1])], axis=1),
    )
    last = jnp.where(played, chunk_length + has_pending - 1, -1)
    logits, cache = policy.decode_fn(params, cache, tokens, length - has_pending, last)
    length = length + jnp.where(played, chunk_length, 0)
    return cache, logits, length, pending, played, wanted & ~played


@functools.partial(
    jax.jit, static_argnames=("policy", "max_length", "stop_ids"), donate_argnames="cache"
)
def _answer(
    params,
    cache,
    logits,
    length,
    pending,
    played,
    refused,
    uniforms,
    temperature,
    top_p,
    *,
    policy: Policy,
    max_length: int,
    stop_ids: tuple[int, ...],
):
    """Samples until every slot that plays is done: cache, context length, pending, result."""
    num_slots = length.shape[0]
    empty = TurnResult(
        tokens=jnp.zeros(uniforms.shape, jnp.int32),
        length=jnp.zeros(num_slots, jnp.int32),
        logp=jnp.zeros(num_slots, jnp.float32),
        truncated=refused,
        full=refused,
    )
    progress = _Progress(
        step=jnp.int32(0), going=played, last=pending, context=length, result=empty
    )

    def draw_and_feed(carry):
        progress, logits, cache = carry
        drawn, logp = _draw(logits, uniforms[:, progress.step], temperature, top_p)
        progress = _advance(progress, drawn, logp, max_length=max_length, stop_ids=stop_ids)

        def feed(cache):
            last = jnp.where(progress.going, 0, -1)
            tokens = jnp.maximum(progress.last, 0)[:, None]
            return policy.decode_fn(params, cache, tokens, progress.context - 1, last)

        logits, cache = jax.lax.cond(
            progress.going.any(), feed, lambda cache: (logits, cache), cache
        )
        return progress, logits, cache

    progress, _, cache = jax.lax.while_loop(
        lambda carry: carry[0].going.any(), draw_and_feed, (progress, logits, cache)
    )
    return cache, progress.context, progress.last, progress.result


@functools.partial(jax.jit, static_argnames=("policy", "length"))
def _resize(cache, *, policy: Policy, length: int):
    return policy.resize_cache(cache, length)


def make_sampler(policy: Policy, settings: SamplerSettings, *, num_slots: int) -> Sampler:
    """Builds the jitted sampler of a policy.

    `Sampler.turn(params, state, chunk, chunk_length, reset, keys)` takes
      params: the policy's parameters,
      state: the `SlotState` of the turn before; it is donated,
      chunk: int32 [S, C], tokens to append to each slot's context, padded at the end with any token
        (let C be one of few sizes: each is compiled once per cache length),
      chunk_length: int32 [S], how many of them count; 0 leaves the slot idle this turn,
      reset: bool [S], the slot starts a new episode: its context is emptied first,
      keys: PRNG keys [S], one per slot and turn
    and returns (state, `TurnResult`). Where a chunk leaves no room for a single sampled token, the
    slot's turn is not played: nothing is appended (a reset is done), and the result says length 0,
    truncated and full.

    The cache is about as long as the longest running context needs (in steps of a half or a third,
    if the policy can resize it), since decoding is bound by reading it.

    Args:
      policy: the model as plain functions.
      settings: lengths, stop tokens, and how to draw.
      num_slots: episodes that run side by side (S).

    Returns:
      The `Sampler`.

    Raises:
      ValueError: `num_slots` < 1; in `turn`, an argument of a wrong shape (the message names it).
    """
    if num_slots < 1:
        raise ValueError(f"num_slots must be >= 1, got {num_slots}")
    shortest = settings.max_length if policy.resize_cache is None else _MIN_CACHE_LENGTH

    def bucket(length: int) -> int:
        size = shortest
        while size < length:  # 256, 384, 512, 768, 1024, …
            size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2
        return min(size, settings.max_length)

    def init() -> SlotState:
        cache_length = bucket(1)
        return SlotState(
            cache=policy.init_cache(num_slots, cache_length),
            length=jnp.zeros(num_slots, jnp.int32),
            pending=jnp.full(num_slots, -1, jnp.int32),
            cache_length=cache_length,
        )

    def turn(params, state, chunk, chunk_length, reset, keys) -> tuple[SlotState, TurnResult]:
        chunk, chunk_length, reset = (
            np.asarray(chunk, np.int32),
            np.asarray(chunk_length, np.int32),
            np.asarray(reset, bool),
        )
        _check_turn(num_slots, chunk, chunk_length, reset, keys)
        kept = np.where(reset, 0, np.asarray(state.length))
        fits = (chunk_length > 0) & (kept + chunk_length < settings.max_length)
        needed = kept + np.where(fits, chunk_length + settings.max_new_tokens, 0)
        cache, cache_length = state.cache, bucket(int(needed.max()))
        if cache_length != state.cache_length:
            cache = _resize(cache, policy=policy, length=cache_length)
        rest, chunk_length = fill_heads(
            params,
            cache,
            kept,
            np.where(reset, -1, np.asarray(state.pending)),
            chunk,
            chunk_length,
            fits,
            policy=policy,
        )
        cache, logits, length, pending, played, refused = _append(
            params,
            rest.cache,
            rest.length,
            rest.pending,
            rest.chunk,
            chunk_length,
            policy=policy,
            max_length=settings.max_length,
        )
        cache, length, pending, result = _answer(
            params,
            cache,
            logits,
            length,
            pending,
            played,
            refused,
            _uniforms(keys, count=settings.max_new_tokens),
            np.float32(settings.temperature),
            np.float32(settings.top_p),
            policy=policy,
            max_length=settings.max_length,
            stop_ids=settings.stop_ids,
        )
        return SlotState(cache, length, pending, cache_length), result

    return Sampler(settings=settings, num_slots=num_slots, init=init, turn=turn)


def _check_turn(
    num_slots: int, chunk: np.ndarray, chunk_length: np.ndarray, reset: np.ndarray, keys: Any
) -> None:
    """Raises ValueError where an argument of `turn` has a wrong shape or an impossible length."""
    if chunk.ndim != 2 or chunk.shape[0] != num_slots or chunk.shape[1] < 1:
        raise ValueError(f"turn: chunk must be int32 [{num_slots}, C >= 1], got {chunk.shape}")
    for name, array in (("chunk_length", chunk_length), ("reset", reset)):
        if array.shape != (num_slots,):
            raise ValueError(f"turn: {name} must have shape ({num_slots},), got {array.shape}")
    if keys.shape[0] != num_slots:
        raise ValueError(f"turn: keys must be one per slot, {num_slots}, got shape {keys.shape}")
    wrong = np.flatnonzero((chunk_length < 0) | (chunk_length > chunk.shape[1]))
    if wrong.size:
        slot = int(wrong[0])
        raise ValueError(
            f"turn: chunk_length[{slot}] = {chunk_length[slot]} is not within 0 … "
            f"{chunk.shape[1]}, the width of chunk"
        )
