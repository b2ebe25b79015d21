"""Laws of the update and of scoring."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
import tiny_lm

from w2sjax.batches import (
    PairSequences,
    Part,
    Sequence,
    pack_rows,
    pair_parts,
    preference_batches,
)
from w2sjax.losses import preference_loss, score_from_logits, sft_loss
from w2sjax.train import cached_scores, init_state, make_sequence_scorer, make_train_step


def close(left, right, tolerance):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def update(loss_fn, loaded, accumulate, tx=None):
    tx = tx if tx is not None else optax.sgd(1.0)
    step = make_train_step(tiny_lm.score_fn, loss_fn, tx, accumulate=accumulate)
    state = init_state(tiny_lm.init_params(), tx)
    return step(state, loaded.batch, loaded.extras)


def test_micro_batches_equal_one_batch_for_sft():
    whole = update(sft_loss, tiny_lm.make_loader().batch(0), 1)
    parts = update(sft_loss, tiny_lm.make_loader(micro_batches=4).batch(0), 4)
    close(whole[1], parts[1], 1e-5)
    close(whole[0].params, parts[0].params, 1e-5)


def make_pairs(count):
    sides = tiny_lm.make_sequences(2 * count, seed=3)
    return [PairSequences(sides[2 * i], sides[2 * i + 1]) for i in range(count)]


def preference_loader(pairs, extras, **options):
    return preference_batches(
        pairs,
        pairs_per_batch=4,
        seed=0,
        total_steps=4,
        extras=extras,
        **options,
    )


def test_micro_batches_equal_one_batch_for_pairs():
    pairs = make_pairs(6)
    extras = {"ref_logps": np.random.default_rng(0).normal(-9, 1, (6, 3)).astype(np.float32)}
    loss = functools.partial(preference_loss, beta=0.5, sft_weight=0.3)
    whole = update(loss, preference_loader(pairs, extras).batch(0), 1)
    parts = update(loss, preference_loader(pairs, extras, micro_batches=2).batch(0), 2)
    close(whole[1], parts[1], 1e-4)
    close(whole[0].params, parts[0].params, 1e-5)


def test_dpo_starts_at_log_2_and_leaves_its_reference_alone():
    pairs = make_pairs(6)
    reference = tiny_lm.init_params()
    before = tiny_lm.digest(reference)
    scorer = make_sequence_scorer(tiny_lm.score_fn, rows_per_batch=3, row_length=tiny_lm.ROW_LENGTH)
    sequences, parts = pair_parts(pairs)
    extras = {"ref_logps": scorer(reference, sequences, parts).reshape(3, -1).T}
    tx = optax.sgd(1.0)
    state = init_state(reference, tx)
    step = make_train_step(tiny_lm.score_fn, functools.partial(preference_loss, beta=0.1), tx)
    loader = preference_loader(pairs, extras)
    losses = []
    for number in range(4):
        loaded = loader.batch(number)
        state, metrics = step(state, loaded.batch, loaded.extras)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert tiny_lm.digest(reference) == before
    assert tiny_lm.digest(state.params) != before
    again = scorer(reference, sequences, parts).reshape(3, -1).T
    np.testing.assert_array_equal(again, extras["ref_logps"])


def test_metrics_tell_the_update():
    loaded = tiny_lm.make_loader().batch(0)
    _, metrics = update(sft_loss, loaded, 1, tiny_lm.make_tx())
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2 / 2, rel=1e-5)
    assert float(metrics["tokens"]) == loaded.batch.loss_count.sum()
    assert metrics.keys() == {"loss", "grad_norm", "learning_rate", "nll", "tokens"}


def test_one_trace_serves_all_steps_and_runs_and_the_state_is_consumed():
    traces = []

    def counted(params, tokens, **options):
        traces.append(tokens.shape)
        return tiny_lm.apply_fn(params, tokens, **options)

    tx = optax.sgd(1.0)
    step = make_train_step(score_from_logits(counted), sft_loss, tx)
    loader = tiny_lm.make_loader()
    for _ in range(2):
        state = init_state(tiny_lm.init_params(), tx)
        for number in range(3):
            loaded = loader.batch(number)
            previous = state
            state, _ = step(state, loaded.batch, loaded.extras)
            assert previous.params["mix"]["kernel"].is_deleted()
    assert len(traces) == 1
    assert int(state.step) == 3


def test_scores_are_sums_of_single_sequences():
    sequences = tiny_lm.make_sequences(9)
    params = tiny_lm.init_params()
    options = {"rows_per_batch": 2, "row_length": tiny_lm.ROW_LENGTH}
    scorer = make_sequence_scorer(tiny_lm.score_fn, **options)
    batches = []
    scores = scorer(params, sequences, on_batch=lambda done, total: batches.append((done, total)))
    assert batches == [(done + 1, len(batches)) for done in range(len(batches))]
    apply_fn = jax.jit(tiny_lm.apply_fn)
    for sequence, score in zip(sequences, scores, strict=True):
        length = len(sequence)
        alone = pack_rows([sequence], tiny_lm.ROW_LENGTH)
        logits = apply_fn(
            params, alone.tokens, positions=alone.positions, subtree_end=alone.subtree_end
        )
        logits = np.asarray(logits, np.float64)[0, :length]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = logps[np.arange(length - 1), sequence.tokens[1:]]
        assert score == pytest.approx((picked * sequence.weights[1:]).sum(), rel=1e-5)


def test_what_sequences_share_is_scored_once():
    sequences = tiny_lm.make_sequences(3)
    sequences.append(Sequence(sequences[0].tokens, sequences[0].weights * 2))
    sequences += [Sequence(one.tokens[:-1], one.weights[:-1]) for one in sequences[:3]]
    make = functools.partial(
        make_sequence_scorer, tiny_lm.score_fn, rows_per_batch=1, row_length=tiny_lm.ROW_LENGTH
    )
    params, counts = tiny_lm.init_params(), {}

    def score(share, sequences, parts=None):
        counts[share, len(sequences)] = seen = []
        return make(share=share)(params, sequences, parts, on_batch=lambda *done: seen.append(done))

    once = score(True, sequences)
    np.testing.assert_array_equal(score(True, sequences * 5), np.tile(once, 5))
    assert counts[True, 7] == counts[True, 35]
    assert once[3] == pytest.approx(2 * once[0])
    np.testing.assert_allclose(score(False, sequences), once, rtol=1e-5)
    assert len(counts[False, 7]) > len(counts[True, 7])
    halves = [Part(0, 4, 99), Part(2, 0, 3), Part(0, 0, 4), Part(2, 3, 99)]
    of_parts = score(True, sequences, halves)
    np.testing.assert_allclose([of_parts[0] + of_parts[2], of_parts[1] + of_parts[3]], once[[0, 2]])
    assert score(True, []).shape == (0,)


def test_scores_are_kept_in_a_file_for_the_same_sequences_and_parts(tmp_path):
    sequences = tiny_lm.make_sequences(3)
    parts = [Part(place, 0, len(one)) for place, one in enumerate(sequences)]
    calls = []

    def get(sequences, parts):
        def compute():
            calls.append(0)
            return np.arange(3, dtype=np.float32) + len(calls)

        return cached_scores(tmp_path / "scores.npz", compute, sequences, parts).tolist()

    assert get(sequences, parts) == get(sequences, parts) == [1, 2, 3]
    assert get(sequences, [*parts[:2], Part(2, 1, 2)]) == [2, 3, 4]
    heavier = [sequences[0].scaled(2), *sequences[1:]]
    assert get(heavier, parts) == [3, 4, 5]
    others = tiny_lm.make_sequences(3, seed=1)
    assert get(others, parts) == get(others, parts) == [4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_a_wrong_batch_is_named():
    with pytest.raises(ValueError, match=r"must be \[2, S, L\] .* Give the loader micro_batches"):
        update(sft_loss, tiny_lm.make_loader().batch(0), 2)
    with pytest.raises(ValueError, match=r"must be \[S, L\]"):
        update(sft_loss, tiny_lm.make_loader(micro_batches=2).batch(0), 1)
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        update(sft_loss, tiny_lm.make_loader().batch(0), 0)


def test_four_devices_give_the_numbers_of_one():
    program = tiny_lm.start_program("mesh", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    printed, _ = program.communicate(timeout=300)
    assert program.returncode == 0
    assert printed.splitlines() == [
        "shards 1",
        "moments like parameters True",
        "shards 2",
        "moments like parameters True",
        "equal True",
    ]
