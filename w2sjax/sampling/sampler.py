"""Batched token sampling with a KV cache; a slot holds one running episode.

A turn appends a chunk of given tokens (the prompt, or the next observation) to a slot's context and
samples an answer: until a stop token or a stop sequence, `max_new_tokens`, or the end of the
context. Turns begin (`feed`) and end (`decode`) in each slot on their own: a slot whose answer is
done can get its next chunk while its neighbours are still speaking. A slot keeps its cache from
turn to turn, so no token is ever computed twice; a new episode takes over what any slot holds of
its prompt, so that a shared instruction, or the prompt of many rollouts, is computed once.

What is in a slot's context after a turn: every chunk token and every sampled token, stop token
included. (The last sampled token is only known, not yet computed: it stands in `SlotState.turns`
and enters the cache in front of the next chunk. Callers need not care.) An answer without a stop
token leaves the context as it is: the caller may append whatever comes next, an end-of-turn token
first.

The token at step j of a turn is drawn with `fold_in(keys[slot], j)` from that slot's logits alone:
an episode depends neither on its slot nor on its neighbours nor on when they speak nor on how many
slots there are, beyond float rounding of the logits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from w2sjax.sampling import slots as layout
from w2sjax.sampling.draw import LEVELS, Filters, draw, uniforms
from w2sjax.types import Policy

_MIN_CACHE_LENGTH = 256  # caches grow from here in steps, so that few shapes are compiled
_ALL = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """What a sampler does at each turn.

    Attributes:
      max_length: longest context of a slot, in tokens, prompt and answers together.
      max_new_tokens: most tokens sampled in one turn, stop token included.
      stop_ids: tokens that end an answer; they belong to it.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw only from so many of the most likely tokens; 0 draws from all.
      top_p: draw only from the smallest set of most likely tokens (after temperature) whose
        probabilities sum to at least this (arXiv 1904.09751); 1 draws from all.
      min_p: draw only tokens at least so likely as this share of the most likely one's probability
        (arXiv 2407.01082); 0 draws from all.
      stop_sequences: token sequences that end an answer as stop tokens do; they belong to it.
    """

    max_length: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(int(token) for token in self.stop_ids))
        sequences = tuple(tuple(map(int, sequence)) for sequence in self.stop_sequences)
        object.__setattr__(self, "stop_sequences", sequences)
        for field in ("max_length", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"SamplerSettings.{field} must be >= 1, got {getattr(self, field)}"
                )
        if not self.stop_ids:
            raise ValueError("SamplerSettings.stop_ids is empty: no answer could ever end")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"SamplerSettings.temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"SamplerSettings.top_k must be >= 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"SamplerSettings.top_p must be in (0, 1], got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"SamplerSettings.min_p must be in [0, 1], got {self.min_p}")
        if any(not sequence for sequence in self.stop_sequences):
            raise ValueError("SamplerSettings.stop_sequences has an empty sequence")

    @property
    def filters(self) -> Filters:
        """As data for the jitted functions."""
        return Filters(
            np.float32(self.temperature),
            np.int32(self.top_k or _ALL),
            np.float32(self.top_p),
            np.float32(self.min_p),
        )


@chex.dataclass(frozen=True)
class Turns:
    """Every slot's context and its turn, which is under way or the last one."""

    length: chex.Array  # int32 [S], tokens in the context, a pending one included
    pending: chex.Array  # int32 [S], last sampled token, not yet in the cache; −1 for none
    going: chex.Array  # bool [S], an answer is being sampled
    count: chex.Array  # int32 [S], tokens sampled, stop token included
    tokens: chex.Array  # int32 [S, max_new_tokens], 0 at and past `count`
    logps: chex.Array  # float32 [S, max_new_tokens], nats, without temperature and filters
    truncated: chex.Array  # bool [S], the answer ended without a stop token or sequence
    full: chex.Array  # bool [S], it did so because the context is full, or the chunk did not fit


@dataclasses.dataclass(frozen=True)
class SlotState:
    """All slots between two calls; `feed` and `decode` consume it."""

    cache: Any  # the policy's cache, on the device
    turns: Turns  # numpy arrays
    uniforms: np.ndarray  # float32 [S, max_new_tokens, LEVELS], what tokens are drawn with
    contexts: np.ndarray  # int32 [S, max_length], tokens of each slot's context
    told: np.ndarray  # bool [S], `decode` has returned the slot's last answer
    cache_length: int  # positions that `cache` holds at present

    @property
    def length(self) -> np.ndarray:
        """int32 [S], tokens in each slot's context."""
        return self.turns.length

    @property
    def pending(self) -> np.ndarray:
        """int32 [S], the last sampled token that is not in the cache; −1 for none."""
        return self.turns.pending

    @property
    def going(self) -> np.ndarray:
        """bool [S], slots whose answer is being sampled."""
        return self.turns.going


@dataclasses.dataclass(frozen=True)
class TurnResult:
    """Answers that have ended; slots without one have length 0 and all flags False."""

    ended: np.ndarray  # bool [S], the slot's turn is over: what stands in its place below is new
    tokens: np.ndarray  # int32 [S, max_new_tokens], 0 at and past `length`
    length: np.ndarray  # int32 [S], sampled tokens, stop token included
    logps: np.ndarray  # float32 [S, max_new_tokens], nats, without temperature and filters
    truncated: np.ndarray  # bool [S], the answer ended without a stop token or sequence
    full: np.ndarray  # bool [S], it did so because the context is full, or the chunk did not fit

    @property
    def logp(self) -> np.ndarray:
        """float32 [S], log-probability of each whole answer, in nats."""
        return self.logps.sum(axis=1)


def _advance(
    turns: Turns,
    drawn: chex.Array,
    logps: chex.Array,
    moves: chex.Array,
    *,
    settings: SamplerSettings,
) -> Turns:
    """Adds a drawn token [S] to every slot that moves, bool [S]."""
    slot = jnp.arange(len(moves))
    max_new_tokens = turns.tokens.shape[1]
    where = jnp.where(moves, turns.count, max_new_tokens)
    tokens = turns.tokens.at[slot, where].set(drawn, mode="drop")
    count = turns.count + moves
    length = turns.length + moves
    stopped = (drawn[:, None] == np.asarray(settings.stop_ids, np.int32)).any(axis=-1)
    for sequence in settings.stop_sequences:
        place = count[:, None] + np.arange(-len(sequence), 0)
        latest = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
        stopped |= ((latest == np.asarray(sequence, np.int32)) & (place >= 0)).all(axis=1)
    full = moves & ~stopped & (length >= settings.max_length)
    goes_on = ~stopped & ~full & (count < max_new_tokens)
    return Turns(
        length=length,
        pending=jnp.where(moves, drawn, turns.pending),
        going=jnp.where(moves, goes_on, turns.going),
        count=count,
        tokens=tokens,
        logps=turns.logps.at[slot, where].set(logps, mode="drop"),
        truncated=jnp.where(moves, ~stopped & ~goes_on, turns.truncated),
        full=jnp.where(moves, full, turns.full),
    )


@functools.partial(
    jax.jit, static_argnames=("policy", "settings", "everyone"), donate_argnames="cache"
)
def _append(
    params,
    cache,
    turns: Turns,
    slots,
    tokens,
    start,
    last,
    draws,
    random,
    filters: Filters,
    *,
    policy: Policy,
    settings: SamplerSettings,
    everyone: bool,
):
    """Computes tokens [G, W] of some slots [G] (past the end: of none), and draws the first token
    of an answer where `draws`, bool [G]. With `everyone` the slots are all, in order.

    Returns:
      The cache, and the turns.
    """
    num_slots = turns.length.shape[0]
    where = None if everyone else slots
    logits, cache = policy.decode_fn(params, cache, tokens, start, last, slots=where)
    drawn, logps = draw(logits, jnp.take(random, slots, axis=0, mode="clip"), filters)
    target = jnp.where(draws, slots, num_slots)

    def spread(values: chex.Array) -> chex.Array:
        return jnp.zeros(num_slots, values.dtype).at[target].set(values, mode="drop")

    moves = spread(draws)
    return cache, _advance(turns, spread(drawn), spread(logps), moves, settings=settings)


@functools.partial(jax.jit, static_argnames=("policy", "settings"), donate_argnames="cache")
def _decode(
    params,
    cache,
    turns: Turns,
    random,
    filters: Filters,
    until,
    max_steps,
    *,
    policy: Policy,
    settings: SamplerSettings,
):
    """Samples until `until` more slots have ended, none is going, or `max_steps` tokens were drawn
    in each: (cache, turns, steps int32 [], slots that were going summed over steps int32 [])."""
    at_first = turns.going.sum()
    last_one = random.shape[1] - 1

    def goes_on(carry):
        _, turns, steps, _ = carry
        going = turns.going.sum()
        return (going > 0) & (at_first - going < until) & (steps < max_steps)

    def step(carry):
        cache, turns, steps, busy = carry
        logits, cache = policy.decode_fn(
            params,
            cache,
            jnp.maximum(turns.pending, 0)[:, None],
            turns.length - 1,
            jnp.where(turns.going, 0, -1),
        )
        place = jnp.minimum(turns.count, last_one)[:, None, None]
        drawn, logps = draw(logits, jnp.take_along_axis(random, place, axis=1)[:, 0], filters)
        busy = busy + turns.going.sum()
        turns = _advance(turns, drawn, logps, turns.going, settings=settings)
        return cache, turns, steps + 1, busy

    zero = jnp.int32(0)
    return jax.lax.while_loop(goes_on, step, (cache, turns, zero, zero))


@functools.partial(jax.jit, static_argnames=("policy", "length"))
def _resize(cache, *, policy: Policy, length: int):
    return policy.resize_cache(cache, length)


@dataclasses.dataclass(frozen=True)
class DecodeWork:
    """What a call of `Sampler.decode` did."""

    steps: int  # passes through the model
    busy: int  # slots that were speaking, summed over them


class Sampler:
    """Plays turns in all slots of a policy; see `make_sampler`.

    Attributes:
      settings: lengths, stop tokens, and how to draw.
      num_slots: episodes that run side by side (S).
    """

    def __init__(self, policy: Policy, settings: SamplerSettings, num_slots: int):
        self.settings, self.num_slots = settings, num_slots
        self._policy = policy
        # What a program depends on; filters are data.
        self._static = dict(
            policy=policy,
            settings=dataclasses.replace(settings, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
        )
        self._filters = settings.filters
        resizable = policy.resize_cache is not None
        self._shortest = _MIN_CACHE_LENGTH if resizable else settings.max_length

    def init(self) -> SlotState:
        """Empty slots."""
        count, answer = self.num_slots, (self.num_slots, self.settings.max_new_tokens)
        cache_length = self._cache_length(1)
        return SlotState(
            cache=self._policy.init_cache(count, cache_length),
            turns=Turns(
                length=np.zeros(count, np.int32),
                pending=np.full(count, -1, np.int32),
                going=np.zeros(count, bool),
                count=np.zeros(count, np.int32),
                tokens=np.zeros(answer, np.int32),
                logps=np.zeros(answer, np.float32),
                truncated=np.zeros(count, bool),
                full=np.zeros(count, bool),
            ),
            uniforms=np.zeros((*answer, LEVELS), np.float32),
            contexts=np.zeros((count, self.settings.max_length), np.int32),
            told=np.ones(count, bool),
            cache_length=cache_length,
        )

    def feed(self, params, state: SlotState, chunk, chunk_length, reset, keys) -> SlotState:
        """Begins turns.

        Where a chunk leaves no room for a single sampled token, the turn is over at once: nothing
        is appended (a reset is done), and its result says length 0, truncated and full.

        Args:
          params: the policy's parameters.
          state: the state before; it is consumed.
          chunk: int32 [S, C], tokens to append to each slot's context, padded at the end with any.
          chunk_length: int32 [S], how many of them count; 0 leaves a slot as it is.
          reset: bool [S], the slot starts a new episode: its context is emptied first.
          keys: PRNG keys [S], one per slot and turn.

        Returns:
          The state after, in which the first token of each answer is drawn.

        Raises:
          ValueError: an argument of a wrong shape, or a slot that is still speaking; the message
            names it.
        """
        chunk, chunk_length, reset = (
            np.asarray(chunk, np.int32),
            np.asarray(chunk_length, np.int32),
            np.asarray(reset, bool),
        )
        _check_turn(self.num_slots, chunk, chunk_length, reset, keys, state.going)
        fed = chunk_length > 0
        length = np.where(reset, 0, state.turns.length).astype(np.int32)
        pending = np.where(reset, -1, state.turns.pending).astype(np.int32)
        fits = fed & (length + chunk_length < self.settings.max_length)
        random = np.asarray(uniforms(keys, count=self.settings.max_new_tokens))
        random = np.where(fed[:, None, None], random, state.uniforms)
        turns = Turns(
            length=(length + np.where(fits, chunk_length, 0)).astype(np.int32),
            pending=pending,
            going=state.going & ~fed,
            count=np.where(fed, 0, state.turns.count).astype(np.int32),
            tokens=np.where(fed[:, None], 0, state.turns.tokens),
            logps=np.where(fed[:, None], np.float32(0), state.turns.logps),
            truncated=np.where(fed, ~fits, state.turns.truncated),
            full=np.where(fed, ~fits, state.turns.full),
        )
        cache, cache_length = self._fitting_cache(state, turns)
        contexts, cached = state.contexts, length - (pending >= 0)
        prompts = {}
        for slot in np.flatnonzero(fits):
            prompts[int(slot)] = chunk[slot, : chunk_length[slot]]
        fresh = {slot: prompts[slot] for slot in prompts if length[slot] == 0}
        waves = [([], list(prompts.keys() - fresh.keys()))]
        if layout.slot_axes(self._policy) is not None:
            waves += layout.plan_copies(fresh, contexts, cached)
        else:
            waves[0][1].extend(fresh)
        for copies, members in waves:
            cache = self._copied(cache, copies)
            have = {copy.target: copy.tokens for copy in copies}
            pieces = []
            for slot in members:
                tokens, start = prompts[slot], int(cached[slot])
                if pending[slot] >= 0:
                    tokens = np.insert(tokens, 0, pending[slot])
                begin = have.get(slot, 0)
                pieces.append(layout.cut(slot, start + begin, tokens[begin:]))
            cache, turns = self._computed(params, cache, turns, pieces, random)
        for slot, prompt in prompts.items():
            contexts[slot, length[slot] : length[slot] + len(prompt)] = prompt
        told = np.where(fed, False, state.told)
        state = SlotState(cache, jax.device_get(turns), random, contexts, told, cache_length)
        return _with_contexts(state, np.flatnonzero(fits), state.turns.length - 1)

    def decode(
        self,
        params,
        state: SlotState,
        *,
        until: int | None = None,
        max_steps: int | None = None,
    ) -> tuple[SlotState, TurnResult, DecodeWork]:
        """Goes on with the answers under way.

        Args:
          params: the policy's parameters.
          state: the state before; it is consumed.
          until: returns once so many of them have ended; all of them where None.
          max_steps: returns after so many tokens of each, whoever has ended.

        Returns:
          The state after, all answers that ended and were not returned before, and the work done.
        """
        before = state.turns.length
        cache, turns, steps, busy = _decode(
            params,
            state.cache,
            state.turns,
            state.uniforms,
            self._filters,
            np.int32(_ALL if until is None else until),
            np.int32(_ALL if max_steps is None else max_steps),
            **self._static,
        )
        turns, steps, busy = jax.device_get((turns, steps, busy))
        ended = ~turns.going & ~state.told
        state = dataclasses.replace(state, cache=cache, turns=turns, told=state.told | ended)
        state = _with_contexts(state, np.flatnonzero(turns.length > before), before)
        result = TurnResult(
            ended=ended,
            tokens=np.where(ended[:, None], turns.tokens, 0),
            length=np.where(ended, turns.count, 0),
            logps=np.where(ended[:, None], turns.logps, np.float32(0)),
            truncated=ended & turns.truncated,
            full=ended & turns.full,
        )
        return state, result, DecodeWork(int(steps), int(busy))

    def turn(self, params, state: SlotState, chunk, chunk_length, reset, keys):
        """One whole turn in some slots: `feed`, then `decode` until all have ended.

        Returns:
          The state after, and the `TurnResult`.
        """
        state = self.feed(params, state, chunk, chunk_length, reset, keys)
        state, result, _ = self.decode(params, state)
        return state, result

    def _cache_length(self, needed: int) -> int:
        size = self._shortest
        while size < needed:  # 256, 384, 512, 768, 1024, …
            size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2
        return min(size, self.settings.max_length)

    def _fitting_cache(self, state: SlotState, turns: Turns) -> tuple[Any, int]:
        """The cache, longer where turns need it, and shorter where they need less than half."""
        speaking = turns.going | ~(turns.truncated | turns.full | (turns.count > 0))
        more = np.where(speaking, self.settings.max_new_tokens, 0)
        needed = int((turns.length + more).max())
        length, now = self._cache_length(needed), state.cache_length
        if length == now or (length < now and 2 * needed > now):
            return state.cache, now
        return _resize(state.cache, policy=self._policy, length=length), length

    def _copied(self, cache: Any, copies: list[layout.Copy]) -> Any:
        size = layout.group_size(self.num_slots)
        for first in range(0, len(copies), size):
            source = np.zeros(size, np.int32)
            target = np.full(size, self.num_slots, np.int32)
            for i, copy in enumerate(copies[first : first + size]):
                source[i], target[i] = copy.source, copy.target
            cache = layout.copy_slots(cache, source, target, policy=self._policy)
        return cache

    def _computed(
        self, params, cache: Any, turns: Turns, inputs: list[list[layout.Piece]], random
    ) -> tuple[Any, Turns]:
        """The cache with all pieces written, and the turns with their first tokens drawn."""
        for round_ in range(max(map(len, inputs), default=0)):
            pieces = [own[round_] for own in inputs if round_ < len(own)]
            for size, group in layout.form_groups(pieces, self.num_slots):
                everyone = size == self.num_slots
                slots = np.arange(size, dtype=np.int32)
                slots = slots if everyone else np.full(size, self.num_slots, np.int32)
                tokens = np.zeros((size, layout.width_of(group)), np.int32)
                start, last = np.zeros(size, np.int32), np.full(size, -1, np.int32)
                draws = np.zeros(size, bool)
                for i, piece in enumerate(group):
                    row = piece.slot if everyone else i
                    slots[row], start[row] = piece.slot, piece.start
                    tokens[row, : len(piece.tokens)] = piece.tokens
                    last[row], draws[row] = len(piece.tokens) - 1, piece.last
                cache, turns = _append(
                    params, cache, turns, slots, tokens, start, last, draws, random[:, 0],
                    self._filters, everyone=everyone, **self._static,
                )  # fmt: skip
        return cache, turns


def make_sampler(policy: Policy, settings: SamplerSettings, *, num_slots: int) -> Sampler:
    """Makes the jitted sampler of a policy.

    The cache is about as long as the longest context needs (in steps of a half or a third, if the
    policy can resize it), since decoding is bound by reading it.

    Args:
      policy: the model as plain functions.
      settings: lengths, stop tokens, and how to draw.
      num_slots: episodes that run side by side (S).

    Returns:
      The `Sampler`.

    Raises:
      ValueError: `num_slots` < 1.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots must be >= 1, got {num_slots}")
    return Sampler(policy, settings, num_slots)


def _with_contexts(state: SlotState, slots: np.ndarray, before: np.ndarray) -> SlotState:
    """The state with what these slots sampled since their lengths `before` in their contexts."""
    turns = state.turns
    for slot in slots:
        new = turns.length[slot] - before[slot]
        sampled = turns.tokens[slot, turns.count[slot] - new : turns.count[slot]]
        state.contexts[slot, before[slot] : turns.length[slot]] = sampled
    return state


def _check_turn(
    num_slots: int,
    chunk: np.ndarray,
    chunk_length: np.ndarray,
    reset: np.ndarray,
    keys: Any,
    going: np.ndarray,
) -> None:
    """Raises ValueError where an argument has a wrong shape, an impossible length or a wrong
    time."""
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
    for name, asked in (("chunk_length", chunk_length > 0), ("reset", reset)):
        if (asked & going).any():
            slot = int(np.flatnonzero(asked & going)[0])
            raise ValueError(f"turn: {name} of slot {slot}, whose answer has not ended")
