"""Laws of the losses: masked is deleted, parts sum to the whole, DPO starts at log 2."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2sjax.batches import Sequence, pack_rows
from w2sjax.losses import (
    Mean,
    dpo_loss,
    per_token_logps,
    preference_loss,
    sequence_lengths,
    sequence_logps,
    sft_loss,
)

VOCABULARY = 11


def make_sequences(count, seed=0, weight=1.0):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(rng.integers(3, 9))
        weights = np.full(length, weight, np.float32)
        weights[: int(rng.integers(1, length - 1))] = 0
        result.append(Sequence(rng.integers(0, VOCABULARY, length), weights))
    return result


def make_logps(batch, seed=0):
    return np.random.default_rng(seed).normal(-3, 1, batch.tokens.shape).astype(np.float32)


def by_token(batch):
    """Log-probabilities that depend on the token alone: places in the row do not matter."""
    return -np.sqrt(1 + batch.tokens.astype(np.float32))


def run(loss_fn, logps, batch, extras=None):
    """Loss and metrics of one batch."""
    return reduce([jax.device_get(jax.jit(loss_fn)(logps, batch, extras or {}))])


def reduce(outputs):
    """Loss and metrics of several micro-batches, as a train step sums them."""
    total = jax.tree.map(lambda *parts: sum(parts), *outputs)
    metrics = {
        name: float(value.total / value.weight if isinstance(value, Mean) else value.total)
        for name, value in total.metrics.items()
    }
    return metrics | {"loss": float(total.loss_sum / total.denominator)}


def test_per_token_logps_is_log_softmax_at_the_predecessor():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (2, 6, VOCABULARY)).astype(np.float32)
    tokens = rng.integers(0, VOCABULARY, (2, 6))
    predecessor = np.array([[0, 0, 1, 1, 3, 2], [0, 0, 1, 2, 0, 4]])
    wanted = [
        [
            logits[s, p, t] - math.log(np.exp(logits[s, p].astype(np.float64)).sum())
            for p, t in zip(predecessor[s], tokens[s], strict=True)
        ]
        for s in range(2)
    ]
    result = jax.jit(per_token_logps)(logits, tokens, predecessor)
    np.testing.assert_allclose(result, wanted, atol=1e-5)


def test_per_token_logps_sums_in_float32():
    narrow = np.random.default_rng(0).normal(0, 5, (1, 4, VOCABULARY)).astype(jnp.bfloat16)
    tokens, predecessor = np.array([[1, 2, 3, 4]]), np.array([[0, 0, 1, 2]])
    result = jax.jit(per_token_logps)(narrow, tokens, predecessor)
    assert result.dtype == jnp.float32
    wide = jax.jit(per_token_logps)(narrow.astype(np.float32), tokens, predecessor)
    np.testing.assert_allclose(result, wide, rtol=1e-6)


def test_sequence_sums_leave_out_padding_and_context():
    sequences = make_sequences(4)
    batch = pack_rows(sequences, 12)
    learned = batch.loss_weight > 0
    logps = make_logps(batch)
    wanted = [logps[(batch.sequence_id == q) & learned].sum() for q in range(4)]
    spoiled = np.where(learned, logps, np.nan)  # what is masked may be anything
    sums = jax.jit(functools.partial(sequence_logps, num_sequences=4))
    np.testing.assert_allclose(
        sums(spoiled, batch.loss_weight, batch.sequence_id), wanted, rtol=1e-6
    )
    lengths = jax.jit(functools.partial(sequence_lengths, num_sequences=5))
    np.testing.assert_array_equal(
        lengths(batch.loss_weight, batch.sequence_id),
        [*(np.count_nonzero(sequence.weights) for sequence in sequences), 0],
    )


def test_masking_a_sequence_equals_deleting_it():
    sequences = make_sequences(3)
    silent = Sequence(sequences[2].tokens, np.zeros(len(sequences[2])))
    with_it = pack_rows([*sequences[:2], silent], 24, num_rows=1)
    without = pack_rows(sequences[:2], 24, num_rows=1)
    spoiled = np.where(with_it.loss_weight > 0, by_token(with_it), np.nan)
    assert run(sft_loss, spoiled, with_it) == pytest.approx(
        run(sft_loss, by_token(without), without)
    )


def test_an_integer_weight_equals_repetition():
    sequences = make_sequences(2)
    weighted = pack_rows([sequences[0].scaled(3), sequences[1]], 40, num_rows=1)
    repeated = pack_rows([sequences[0]] * 3 + [sequences[1]], 40, num_rows=1)
    assert run(sft_loss, by_token(weighted), weighted)["loss"] == pytest.approx(
        run(sft_loss, by_token(repeated), repeated)["loss"]
    )


def test_sft_metrics_count_tokens_once_whatever_their_weight():
    batch = pack_rows(make_sequences(3, weight=4.0), 12)
    logps = make_logps(batch)
    learned = batch.loss_weight > 0
    metrics = run(sft_loss, logps, batch)
    assert metrics["tokens"] == learned.sum()
    assert metrics["nll"] == pytest.approx(-logps[learned].mean())


def test_sums_and_denominators_of_parts_add_up():
    whole = pack_rows(make_sequences(6), 8, num_rows=6)
    logps = make_logps(whole)

    def part(rows):
        fields = {
            field.name: getattr(whole, field.name)[rows] for field in dataclasses.fields(whole)
        }
        return jax.device_get(sft_loss(logps[rows], type(whole)(**fields), {}))

    parts = [part(slice(0, 1)), part(slice(1, 6))]
    assert reduce(parts) == pytest.approx(run(sft_loss, logps, whole))


def test_dpo_at_the_reference_is_log_2():
    chosen, rejected = np.float32([-3.0, -90.0]), np.float32([-40.0, -1.0])
    loss = functools.partial(dpo_loss, chosen, rejected, chosen, rejected)
    np.testing.assert_allclose(loss(beta=0.1), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss(beta=2.0, label_smoothing=0.3), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss(beta=0.1, loss_type="ipo"), 25.0, rtol=1e-6)


def test_dpo_follows_its_equations():
    sides = [np.float32([value]) for value in (-3.0, -5.0, -4.0, -4.5)]
    gain = (-3.0 + 4.0) - (-5.0 + 4.5)
    wanted = math.log1p(math.exp(-0.5 * gain))
    loss = functools.partial(dpo_loss, *sides, beta=0.5)
    assert float(loss()[0]) == pytest.approx(wanted)
    assert float(loss(loss_type="ipo")[0]) == pytest.approx((gain - 1.0) ** 2)
    flipped = math.log1p(math.exp(0.5 * gain))
    assert float(loss(label_smoothing=0.2)[0]) == pytest.approx(0.8 * wanted + 0.2 * flipped)


def test_dpo_pushes_the_two_sides_apart():
    def total(chosen, rejected):
        return dpo_loss(chosen, rejected, np.zeros(1), np.zeros(1), beta=0.1).sum()

    up, down = jax.jit(jax.grad(total, argnums=(0, 1)))(np.zeros(1), np.zeros(1))
    assert float(up[0]) == pytest.approx(-0.05) and float(down[0]) == pytest.approx(0.05)


class Preferences:
    """Three pairs, their log-probabilities, and everything a loss should say, in numpy."""

    def __init__(self):
        sequences = make_sequences(6)
        self.batch = pack_rows(sequences, 16)
        self.logps = make_logps(self.batch)
        learned = self.batch.loss_weight > 0
        places = [(self.batch.sequence_id == q) & learned for q in range(6)]
        sums = np.array([self.logps[place].sum() for place in places])
        lengths = np.array([place.sum() for place in places])
        references = (sums + np.random.default_rng(5).normal(0, 1, 6)).astype(np.float32)
        self.sums, self.lengths, self.references = (
            array.reshape(2, 3) for array in (sums, lengths, references)
        )
        self.extras = {
            "ref_chosen_logps": self.references[0],
            "ref_rejected_logps": self.references[1],
        }

    def run(self, **options):
        loss_fn = functools.partial(preference_loss, **options)
        return run(loss_fn, self.logps, self.batch, self.extras)


def mean_dpo(sums, references, beta):
    gain = (sums[0] - references[0]) - (sums[1] - references[1])
    return np.log1p(np.exp(-beta * gain)).mean()


def test_preference_loss_and_its_metrics():
    data = Preferences()
    chosen, rejected = 0.3 * (data.sums - data.references)
    assert data.run(beta=0.3) == pytest.approx(
        {
            "loss": mean_dpo(data.sums, data.references, 0.3),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).mean(),
            "logps/chosen": data.sums[0].mean(),
            "logps/rejected": data.sums[1].mean(),
            "nll_loss": (-data.sums[0] / data.lengths[0]).mean(),
            "tokens/chosen": data.lengths[0].mean(),
            "tokens/rejected": data.lengths[1].mean(),
            "tokens": data.lengths.sum(),
        },
        rel=1e-4,
        abs=1e-5,
    )


def test_the_likelihood_term_is_added_per_pair():
    data = Preferences()
    plain, mixed = data.run(beta=0.1), data.run(beta=0.1, sft_weight=0.7)
    assert mixed["loss"] == pytest.approx(plain["loss"] + 0.7 * plain["nll_loss"], rel=1e-5)


def test_length_normalisation_divides_both_policies():
    data = Preferences()
    metrics = data.run(beta=2.0, length_normalized=True)
    wanted = mean_dpo(data.sums / data.lengths, data.references / data.lengths, 2.0)
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(data.sums[0].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": 0.1, "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"beta": 0.1, "loss_type": "hinge"}, "'sigmoid' or 'ipo'; got 'hinge'"),
        ({"beta": 0.1, "loss_type": "ipo", "label_smoothing": 0.1}, "'sigmoid' only"),
        ({"beta": 0.1, "sft_weight": -1.0}, "sft_weight must not be negative"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Preferences().run(**options)


def test_missing_reference_is_named():
    data = Preferences()
    with pytest.raises(KeyError, match="ref_chosen_logps"):
        preference_loss(data.logps, data.batch, {}, beta=0.1)
