"""Laws of the sampler: what is in a slot's context, how tokens are drawn, independence of slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2sjax.models import ModelConfig, init_params, make_policy
from w2sjax.sampling import draw as draw_lib
from w2sjax.sampling import sampler as sampler_lib
from w2sjax.sampling import slots as layout
from w2sjax.sampling.sampler import SamplerSettings, make_sampler
from w2sjax.types import Policy

VOCAB = 11
STOP = 3


class HashPolicy:
    """A policy without a model: logits are a hash of every token of the context, in order.

    Its cache holds token + 1, so that contexts can be read off, and any stray or missing token
    changes the logits of everything after it.
    """

    def __init__(self, resizable=False, bonus=None):
        self.traces = 0
        self.bonus = jnp.zeros(VOCAB) if bonus is None else bonus
        self.policy = Policy(
            lambda params, tokens: tokens,
            lambda params, batch: batch.tokens,
            lambda slots, length: jnp.zeros((slots, length), jnp.int32),
            self.decode,
            self.resize if resizable else None,
        )

    def decode(self, params, cache, tokens, start, last, *, slots=None):
        self.traces += 1
        length = cache.shape[1]
        slots = jnp.arange(len(cache)) if slots is None else slots
        index = jnp.arange(tokens.shape[1])[None]
        where = jnp.where(index <= last[:, None], start[:, None] + index, length)
        cache = cache.at[slots[:, None], where].set(tokens + 1, mode="drop")
        visible = jnp.arange(length)[None] <= (start + last)[:, None]
        weights = jnp.arange(1, length + 1) * 7919 + 13
        rows = jnp.take(cache, slots, axis=0, mode="clip")
        digest = jnp.where(visible, rows * weights, 0).sum(axis=1)
        return self.logits(digest), cache

    def logits(self, digest):
        mixed = (digest[:, None] * 31 + jnp.arange(VOCAB) * 977) % 101
        return mixed.astype(jnp.float32) / 25.0 + self.bonus

    def resize(self, cache, length):
        grown = jnp.pad(cache, ((0, 0), (0, max(0, length - cache.shape[1]))))
        return grown[:, :length]

    def logits_after(self, context):
        weights = np.arange(1, len(context) + 1) * 7919 + 13
        digest = ((np.array(context) + 1) * weights).sum()
        mixed = (digest * 31 + np.arange(VOCAB) * 977) % 101
        return mixed / np.float32(25.0) + np.asarray(self.bonus)


def _settings(**changes):
    values = dict(max_length=64, max_new_tokens=5, stop_ids=(STOP,), temperature=1.0)
    return SamplerSettings(**(values | changes))


def _keys(*data):
    """One key for each row of data, from nothing but the row."""
    return _fold(jax.random.key(7), np.array(data, np.uint32))


_fold = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def _log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _chunks(rng, slots, width=8):
    chunk = rng.integers(4, VOCAB, (slots, width))
    return chunk, rng.integers(1, width + 1, slots)


def _cached_context(state, slot):
    """What a HashPolicy's slot holds, and the pending token."""
    length, pending = int(state.length[slot]), int(state.pending[slot])
    cached = np.asarray(state.cache)[slot, : length - (pending >= 0)] - 1
    return [*cached.tolist(), *([pending] if pending >= 0 else [])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_contexts_are_chunks_and_samples_and_greedy_is_argmax(temperature):
    fake = HashPolicy()
    sampler = make_sampler(fake.policy, _settings(temperature=temperature), num_slots=4)
    state, rng = sampler.init(), np.random.default_rng(0)
    contexts = [[] for _ in range(4)]
    for turn in range(5):
        chunk, length = _chunks(rng, 4)
        length[turn % 4] = 0  # one slot is idle
        reset = np.arange(4) == (3 if turn == 2 else -1)
        state, result = sampler.turn(None, state, chunk, length, reset, _keys(*range(4)))
        for slot in range(4):
            if reset[slot]:
                contexts[slot] = []
            contexts[slot] += chunk[slot, : length[slot]].tolist()
            count, logp = int(result.length[slot]), 0.0
            assert (count > 0) == (length[slot] > 0)
            for token in np.asarray(result.tokens)[slot, :count].tolist():
                logits = fake.logits_after(contexts[slot])
                logp += float(_log_softmax(logits)[token])
                if temperature == 0.0:
                    assert token == logits.argmax()
                contexts[slot].append(token)
            stopped = count > 0 and contexts[slot][-1] == STOP
            assert STOP not in np.asarray(result.tokens)[slot, : max(count - 1, 0)]
            assert bool(result.truncated[slot]) == (count > 0 and not stopped)
            assert not result.full[slot]
            assert (np.asarray(result.tokens)[slot, count:] == 0).all()
            assert float(result.logp[slot]) == pytest.approx(logp, abs=1e-4)
            assert _cached_context(state, slot) == contexts[slot]
            assert int(state.length[slot]) == len(contexts[slot])


def test_full_contexts_end_answers_and_refuse_chunks():
    fake = HashPolicy(bonus=jnp.where(jnp.arange(VOCAB) == STOP, -100.0, 0.0))  # never stops
    sampler = make_sampler(fake.policy, _settings(max_length=12), num_slots=4)
    chunk, length = np.full((4, 12), 5), np.array([4, 9, 11, 12])
    state, result = sampler.turn(
        None, sampler.init(), chunk, length, np.ones(4, bool), _keys(*range(4))
    )
    np.testing.assert_array_equal(result.length, [5, 3, 1, 0])
    np.testing.assert_array_equal(result.truncated, [True] * 4)
    np.testing.assert_array_equal(result.full, [False, True, True, True])
    np.testing.assert_array_equal(state.length, [9, 12, 12, 0])
    # the first goes on: its pending token and two more, then one sample fills the context
    state, result = sampler.turn(
        None, state, chunk, np.array([2, 1, 1, 3]), np.zeros(4, bool), _keys(*range(4))
    )
    np.testing.assert_array_equal(result.length, [1, 0, 0, 5])
    np.testing.assert_array_equal(result.full, [True, True, True, False])
    np.testing.assert_array_equal(state.length, [12, 12, 12, 8])
    assert _cached_context(state, 0)[9:11] == [5, 5]


def test_an_episode_does_not_depend_on_slot_neighbours_or_slot_count():
    fake = HashPolicy()

    def episode(num_slots, slot, seed):
        sampler = make_sampler(fake.policy, _settings(), num_slots=num_slots)
        state, mine = sampler.init(), np.random.default_rng(0)
        others, tokens = np.random.default_rng(seed), []
        for turn in range(4):
            chunk, length = _chunks(others, num_slots)
            row, size = _chunks(mine, 1)
            chunk[slot], length[slot] = row[0], size[0]
            data = others.integers(1000, 2000, num_slots)
            data[slot] = turn
            reset = others.random(num_slots) < 0.5
            reset[slot] = turn == 0
            state, result = sampler.turn(None, state, chunk, length, reset, _keys(*data))
            tokens.append(np.asarray(result.tokens)[slot].tolist())
        return tokens

    alone = episode(1, 0, 1)
    assert alone == episode(5, 3, 2) == episode(5, 0, 3)
    assert any(len(set(turn)) > 1 for turn in alone)


def test_model_episodes_equal_recomputation_and_ignore_the_batch():
    config = ModelConfig(
        vocab_size=VOCAB, width=32, num_layers=1, num_heads=4, num_kv_heads=2, mlp_width=48
    )
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    policy = make_policy(config)
    settings = _settings(temperature=0.8)

    def play(num_slots, slot):
        sampler = make_sampler(policy, settings, num_slots=num_slots)
        state, rng = sampler.init(), np.random.default_rng(5)
        context, sampled, logps = [], [], []
        for turn in range(4):
            row, size = _chunks(rng, 1)
            chunk, length = _chunks(np.random.default_rng(slot + turn), num_slots)
            chunk[slot], length[slot] = row[0], size[0]
            keys = _keys(*(np.arange(num_slots) - slot + 100 * turn + 50))
            state, result = sampler.turn(
                params, state, chunk, length, np.full(num_slots, turn == 0), keys
            )
            answer = np.asarray(result.tokens)[slot, : int(result.length[slot])].tolist()
            context += row[0, : size[0]].tolist()
            sampled.append((len(context), answer))
            context += answer
            logps.append(float(result.logp[slot]))
        return state, context, sampled, logps

    state, context, sampled, logps = play(1, 0)
    for other in ((3, 2), (3, 0)):
        _, other_context, _, other_logps = play(*other)
        assert other_context == context
        np.testing.assert_allclose(other_logps, logps, atol=1e-4)
    # the sampled answers' log-probabilities are the full pass's
    logits = jax.jit(policy.apply_fn)(params, np.array([context]))
    full = _log_softmax(np.asarray(logits))[0]
    for (begin, answer), logp in zip(sampled, logps, strict=True):
        expected = sum(full[begin + i - 1, token] for i, token in enumerate(answer))
        assert logp == pytest.approx(expected, abs=1e-4)
    # the cache is that of one pass over the concatenated tokens
    cached = len(context) - 1  # the last token is pending
    _, cache = jax.jit(policy.decode_fn)(
        params,
        policy.init_cache(1, state.cache_length),
        np.array([context]),
        np.zeros(1, np.int32),
        np.array([cached - 1]),
    )
    for (keys, values), (all_keys, all_values) in zip(state.cache, cache, strict=True):
        np.testing.assert_allclose(keys[..., :cached], all_keys[..., :cached], atol=1e-5)
        np.testing.assert_allclose(values[:, :, :cached], all_values[:, :, :cached], atol=1e-5)


def test_resizing_the_cache_changes_no_token(monkeypatch):
    monkeypatch.setattr(sampler_lib, "_MIN_CACHE_LENGTH", 32)
    runs = []
    for resizable in (False, True):
        sampler = make_sampler(HashPolicy(resizable).policy, _settings(max_length=48), num_slots=2)
        state, tokens, lengths = sampler.init(), [], []
        for turn in range(6):
            chunk = np.random.default_rng(turn).integers(4, VOCAB, (2, 8))
            state, result = sampler.turn(
                None, state, chunk, np.full(2, 8), np.full(2, turn in (0, 4)), _keys(turn, turn + 9)
            )
            tokens.append(np.asarray(result.tokens).tolist())
            lengths.append(state.cache_length)
        runs.append((tokens, lengths))
    assert runs[0][0] == runs[1][0]
    assert set(runs[0][1]) == {48}
    assert runs[1][1][0] == 32 and runs[1][1][3] == 48 and runs[1][1][4] == 32


def test_shapes_are_compiled_once():
    fake = HashPolicy()
    for num_turns in (1, 3):
        # A second sampler is free, at other temperatures too.
        settings = _settings(temperature=0.5 * num_turns, top_p=1 - 0.1 * num_turns)
        sampler = make_sampler(fake.policy, settings, num_slots=2)
        state = sampler.init()
        for turn in range(num_turns):
            chunk = np.full((2, 4), 4 + turn)
            state, _ = sampler.turn(
                None, state, chunk, np.array([turn % 2, 3]), np.array([True, False]), _keys(0, 1)
            )
    assert fake.traces == 2  # one chunk, one decode step


def test_draws_follow_temperature_and_filters():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -30.0])
    keys = _keys(*range(20_000))
    rows = np.broadcast_to(np.float32(logits), (20_000, 6))
    draw = jax.jit(draw_lib.draw)
    uniform = draw_lib.uniforms(keys, count=2)[:, 1]
    cases = [
        (dict(temperature=0.5), 6),
        (dict(top_p=0.8), 3),
        (dict(temperature=2.0, top_p=0.1), 1),
        (dict(top_k=2), 2),
        (dict(top_k=4, top_p=0.9), 3),  # of what top-k left, three have nine tenths
        (dict(min_p=0.2), 3),
        (dict(temperature=2.0, min_p=0.2), 5),
    ]
    for changes, kept in cases:
        tokens, logps = draw(rows, uniform, _settings(**changes).filters)
        probs = np.exp(logits / changes.get("temperature", 1.0))
        probs[kept:] = 0.0
        probs /= probs.sum()
        frequency = np.bincount(tokens, minlength=6) / 20_000
        np.testing.assert_allclose(frequency, probs, atol=0.012)
        assert (frequency[kept:] == 0).all()
        np.testing.assert_allclose(logps, _log_softmax(logits)[np.asarray(tokens)], atol=1e-5)


def test_the_token_at_step_j_is_drawn_from_the_key_folded_with_j():
    uniforms = draw_lib.uniforms(_keys(4, 5), count=3)
    for slot, step in np.ndindex(2, 3):
        expected = jax.random.uniform(jax.random.fold_in(_keys(4, 5)[slot], step), (4,))
        assert uniforms[slot, step].tolist() == expected.tolist()


def _start(sampler, state, slots, length=4, seed=0):
    """Feeds some slots the first tokens of a prompt, as new episodes."""
    count = sampler.num_slots
    chunk = np.random.default_rng(seed).integers(4, VOCAB, (count, length))
    fed = np.isin(np.arange(count), slots)
    return sampler.feed(None, state, chunk, fed * length, fed, _keys(*range(count)))


def test_turns_begin_and_end_in_each_slot_on_their_own():
    """Slots that are fed one after the other, and heard of a few at a time, say what they say when
    all take their turns together."""
    sampler = make_sampler(HashPolicy().policy, _settings(max_new_tokens=12), num_slots=6)
    chunk = np.random.default_rng(0).integers(4, VOCAB, (6, 4))
    everyone = np.ones(6, bool)
    state, wanted = sampler.turn(
        None, sampler.init(), chunk, 4 * everyone, everyone, _keys(*range(6))
    )
    contexts = [_cached_context(state, slot) for slot in range(6)]
    state, told, steps, busy = sampler.init(), [], 0, 0
    for slot in range(6):
        state = _start(sampler, state, [slot])
        assert not state.told[slot]
        state, result, work = sampler.decode(None, state, until=1, max_steps=2)
        steps, busy = steps + work.steps, busy + work.busy
        assert work.steps <= 2
        told.append(result)
    while state.going.any():
        before = state.going.sum()
        state, result, work = sampler.decode(None, state, until=1)
        steps, busy = steps + work.steps, busy + work.busy
        assert state.going.sum() < before
        told.append(result)
    assert sum(result.ended.astype(int) for result in told).tolist() == [1] * 6
    for field in ("tokens", "length", "logps", "truncated"):
        parts = sum(np.asarray(getattr(result, field), float) for result in told)
        np.testing.assert_allclose(parts, np.asarray(getattr(wanted, field), float), atol=1e-6)
    assert [_cached_context(state, slot) for slot in range(6)] == contexts
    for slot, context in enumerate(contexts):
        assert state.contexts[slot, : state.length[slot]].tolist() == context
    # The first token of an answer comes with its chunk.
    assert busy == sum(wanted.length - 1) and steps <= busy
    with pytest.raises(ValueError, match="slot 2, whose answer has not ended"):
        bare = HashPolicy(bonus=jnp.where(jnp.arange(VOCAB) == STOP, -100.0, 0.0)).policy
        sampler = make_sampler(bare, _settings(), num_slots=6)
        _start(sampler, _start(sampler, sampler.init(), [2]), [1, 2])


def test_stop_sequences_end_answers_and_belong_to_them():
    fake = HashPolicy()
    _, plain = make_sampler(fake.policy, _settings(max_new_tokens=30), num_slots=16).turn(
        None, _init(fake, 16), *_prompts(16)
    )
    answers = [plain.tokens[i, : plain.length[i]].tolist() for i in range(16)]
    long = next(answer for answer in answers if len(answer) > 6)
    sequences = ((long[2], long[3]), (9, 9, 9, 9, 9))
    settings = _settings(max_new_tokens=30, stop_sequences=sequences)
    _, result = make_sampler(fake.policy, settings, num_slots=16).turn(
        None, _init(fake, 16), *_prompts(16)
    )
    cut = 0
    for i, answer in enumerate(answers):
        ends = [j + 2 for j in range(len(answer)) if tuple(answer[j : j + 2]) == sequences[0]]
        wanted = answer[: ends[0]] if ends else answer
        cut += len(wanted) < len(answer)
        assert result.tokens[i, : result.length[i]].tolist() == wanted
        assert result.truncated[i] == (not ends and answer[-1] != STOP)
    assert cut


def _init(fake, slots):
    return make_sampler(fake.policy, _settings(max_new_tokens=30), num_slots=slots).init()


def _prompts(slots):
    chunk = np.random.default_rng(3).integers(4, VOCAB, (slots, 5))
    return chunk, np.full(slots, 5), np.ones(slots, bool), _keys(*range(slots))


class CountingPolicy(HashPolicy):
    """Notes how many tokens the cached pass was given."""

    def __init__(self):
        super().__init__()
        self.computed = 0

    def decode(self, params, cache, tokens, start, last, *, slots=None):
        jax.debug.callback(self._count, last)
        return super().decode(params, cache, tokens, start, last, slots=slots)

    def _count(self, last):
        self.computed += int((last + 1).sum())


def test_what_prompts_have_in_common_is_computed_once():
    """An instruction, four tasks, four rollouts each: all answers as without sharing."""
    fake, slots = CountingPolicy(), 16
    rng = np.random.default_rng(0)
    instruction, tasks = rng.integers(4, VOCAB, 24), rng.integers(4, VOCAB, (4, 20))
    chunk = np.stack([np.concatenate([instruction, tasks[slot // 4]]) for slot in range(slots)])
    settings = _settings(max_length=80, max_new_tokens=1)
    sampler = make_sampler(fake.policy, settings, num_slots=slots)
    arguments = chunk, np.full(slots, 44), np.ones(slots, bool), _keys(*range(slots))
    state, result = sampler.turn(None, sampler.init(), *arguments)
    jax.effects_barrier()
    # The first slot computes all; the first of each other task its own 20; the rest a token each.
    assert fake.computed == 44 + 3 * 20 + 12
    for slot in range(slots):
        assert _cached_context(state, slot)[:44] == chunk[slot].tolist()
        alone = make_sampler(fake.policy, settings, num_slots=1)
        _, wanted = alone.turn(
            None, alone.init(), chunk[slot : slot + 1], np.array([44]), np.ones(1, bool),
            _keys(slot),
        )  # fmt: skip
        assert result.tokens[slot].tolist() == wanted.tokens[0].tolist()
    # Later episodes take over what older ones left, from slots that are not speaking too.
    jax.effects_barrier()
    fake.computed = 0
    state, _ = sampler.turn(
        None, state, chunk[::-1], np.where(np.arange(slots) < 2, 44, 0),
        np.arange(slots) < 2, _keys(*range(slots)),
    )  # fmt: skip
    jax.effects_barrier()
    assert fake.computed == 2


def test_waves_copy_only_what_is_there():
    """Whoever copies, copies a true prefix from a slot that holds it by then."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        slots = int(rng.integers(1, 12))
        contexts = rng.integers(0, 2, (slots, 40)) * (rng.random((slots, 1)) < 0.5)
        cached = rng.integers(0, 41, slots)
        starting = np.flatnonzero(rng.random(slots) < 0.6)
        prompts = {}
        for slot in starting:
            prompt = np.zeros(int(rng.integers(1, 40)), int)
            prompt[int(rng.integers(len(prompt))) :] = rng.integers(0, 3)
            prompts[int(slot)] = prompt
        held = {slot: contexts[slot, : cached[slot]] for slot in range(slots)}
        for slot in prompts:
            held[slot] = contexts[slot, :0]
        seen = []
        for copies, members in layout.plan_copies(prompts, contexts, cached):
            assert {copy.target for copy in copies} <= set(members)
            for source, target, tokens in copies:
                assert layout.LEAST_SHARED <= tokens < len(prompts[target])
                assert held[source][:tokens].tolist() == prompts[target][:tokens].tolist()
            held |= {slot: prompts[slot] for slot in members}
            seen += members
        assert sorted(seen) == sorted(prompts)


@pytest.mark.parametrize("size", [1, 16, 17, 65, 256, 300, 513, layout.WIDTHS[-1] * 20 + 5])
def test_long_chunks_are_cut_into_pieces_with_little_padding(size):
    tokens = np.arange(size)
    pieces = layout.cut(3, 10, tokens)
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == tokens.tolist()
    assert [piece.start for piece in pieces] == [10 + int(piece.tokens[0]) for piece in pieces]
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.tokens) in layout.WIDTHS for piece in pieces[:-1])
    padded = sum(layout.width_of([piece]) for piece in pieces)
    assert padded <= max(16, 2 * size) and (size < 200 or padded <= 1.1 * size)
    assert len(pieces) <= 1 + 2 * len(layout.WIDTHS) + size // layout.WIDTHS[-1]


def test_groups_hold_everyone_and_a_long_prompt_is_computed_alone():
    rng = np.random.default_rng(0)
    for slots in (1, 3, 8, 64):
        some = [
            layout.Piece(int(slot), 0, np.zeros(int(rng.integers(1, 300))), True)
            for slot in rng.permutation(slots)[: 1 + slots // 2]
        ]
        groups = layout.form_groups(some, slots)
        members = [piece for _, group in groups for piece in group]
        assert sorted(p.slot for p in members) == sorted(p.slot for p in some)
        assert all(layout.width_of(group) >= len(p.tokens) for _, group in groups for p in group)
        assert all(size == slots or len(group) <= size for size, group in groups)
    prompt = layout.Piece(5, 0, np.zeros(256), True)
    assert layout.form_groups([prompt], 64) == [(1, [prompt])]
    assert [size for size, _ in layout.form_groups([prompt._replace(tokens=np.zeros(9))], 64)] == [
        layout.group_size(64)
    ]


@pytest.mark.parametrize("vocab", [1, 2, 4, 37, 300])
def test_inversion_is_the_cumulative_distribution_of_each_level(vocab):
    rng = np.random.default_rng(vocab)
    probs = rng.dirichlet(np.full(vocab, 0.3), 64).astype(np.float32)
    probs[:, rng.integers(vocab)] *= vocab == 1
    uniform = rng.random((64, 4), np.float32)
    uniform[:2] = [[0.0], [np.nextafter(np.float32(1), np.float32(0))]]
    drawn = np.asarray(jax.jit(draw_lib.invert)(probs, uniform))
    size = int(np.ceil(vocab**0.25 - 1e-9))
    leaves = np.pad(probs.astype(np.float64), ((0, 0), (0, size**4 - vocab)))
    for row, token in enumerate(drawn):
        assert probs[row, token] > 0
        block = leaves[row].reshape([size] * 4)
        for number, digit in zip(uniform[row], np.unravel_index(token, [size] * 4), strict=True):
            sums = block.reshape(size, -1).sum(axis=1).cumsum() / block.sum()
            assert sums[digit] >= number - 1e-6
            assert digit == 0 or sums[digit - 1] <= number + 1e-6
            block = block[digit]


def test_draws_follow_the_probabilities_and_hardly_depend_on_rounding():
    """Logits of another order of summation differ by about 1e-6 of their size."""
    rng = np.random.default_rng(0)
    vocab, count = 1000, 20_000
    logits = 4 * rng.normal(size=vocab)
    keys = jax.random.split(jax.random.key(0), count)
    uniform = draw_lib.uniforms(keys, count=1)[:, 0]

    def drawn(logits):
        probs = jnp.exp(jnp.asarray(logits - logits.max(), jnp.float32))
        return np.asarray(jax.jit(draw_lib.invert)(jnp.tile(probs, (count, 1)), uniform))

    tokens = drawn(logits)
    probs = np.exp(logits) / np.exp(logits).sum()
    often = probs > 0.002
    shares = np.bincount(tokens, minlength=vocab)[often] / count
    np.testing.assert_allclose(shares, probs[often], atol=4 * np.sqrt(probs[often].max() / count))
    moved = drawn(logits + 1e-6 * np.abs(logits).max() * rng.normal(size=vocab))
    assert (moved != tokens).sum() <= 2


def test_nucleus_is_the_smallest_sufficient_set():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(40, 0.3), 50).astype(np.float32)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        kept = np.asarray(draw_lib.keep_top_p(jnp.asarray(probs), top_p)) > 0
        for row in range(50):
            order = np.argsort(-probs[row], kind="stable")
            count = int(np.searchsorted(np.cumsum(probs[row][order]), top_p)) + 1
            assert set(np.flatnonzero(kept[row])) == set(order[:count])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 0),
        ("max_new_tokens", 0),
        ("stop_ids", ()),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.1),
        ("stop_sequences", ((),)),
    ],
)
def test_impossible_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        _settings(**{field: value})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("chunk", np.zeros((3, 4), int)),
        ("chunk_length", np.array([1, 5])),
        ("chunk_length", np.array([1, 1, 1])),
        ("reset", np.zeros(3, bool)),
        ("keys", _keys(0, 1, 2)),
    ],
)
def test_misshapen_turns_name_the_argument(name, argument):
    sampler = make_sampler(HashPolicy().policy, _settings(), num_slots=2)
    arguments = dict(
        chunk=np.zeros((2, 4), int),
        chunk_length=np.ones(2, int),
        reset=np.zeros(2, bool),
        keys=_keys(0, 1),
    )
    with pytest.raises(ValueError, match=name):
        sampler.turn(None, sampler.init(), **(arguments | {name: argument}))
