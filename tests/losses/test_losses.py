"""Laws of the losses: masked is deleted, shared is counted, parts sum to the whole, DPO starts at
log 2.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2sjax.batches import PairSequences, Part, Sequence, pack_rows, pair_parts
from w2sjax.losses import (
    Mean,
    pair_loss,
    path_sums,
    per_token_logps,
    preference_loss,
    score_from_logits,
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


def by_token(batch):
    """Log-probabilities that depend on the token alone: places in the row do not matter."""
    return -np.sqrt(1 + np.asarray(batch.tokens, np.float32))


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


def test_scores_of_a_model_that_gives_logits_are_those_of_learned_tokens_alone():
    batch = pack_rows(make_sequences(4), 12)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (*batch.tokens.shape, VOCABULARY)).astype(np.float32)
    given = {}

    def apply_fn(params, tokens, **options):
        given.update(options)
        return logits * params

    scores = score_from_logits(apply_fn)(2.0, batch)
    assert given.keys() == {"positions", "subtree_end"}
    wanted = per_token_logps(2 * logits, batch.tokens, batch.predecessor)
    np.testing.assert_array_equal(scores, np.where(batch.loss_count > 0, wanted, 0))
    score_from_logits(apply_fn)(2.0, batch, dropout_key="key")
    assert given["dropout_key"] == "key"


def test_path_sums_leave_out_padding_and_context():
    sequences = [*make_sequences(4), make_sequences(1)[0].scaled(0.5)]  # the first once more
    parts = [Part(place, 0, len(one)) for place, one in enumerate(sequences)]
    parts.append(Part(1, len(sequences[1]) - 1, len(sequences[1])))
    batch = pack_rows(sequences, 12, parts=parts)
    spoiled = np.where(batch.loss_count > 0, by_token(batch), np.nan)  # masked may be anything
    wanted = [
        (by_token(one)[part.start : part.stop] * one.weights[part.start : part.stop]).sum()
        for part in parts
        for one in [sequences[part.sequence]]
    ]
    sums = jax.jit(functools.partial(path_sums, num_paths=7))(spoiled, batch)
    np.testing.assert_allclose(sums, [*wanted, 0], rtol=1e-6)


def test_masking_a_sequence_equals_deleting_it():
    sequences = make_sequences(3)
    silent = Sequence(sequences[2].tokens, np.zeros(len(sequences[2])))
    with_it = pack_rows([*sequences[:2], silent], 24, num_rows=1)
    without = pack_rows(sequences[:2], 24, num_rows=1)
    spoiled = np.where(with_it.loss_count > 0, by_token(with_it), np.nan)
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


def test_sft_counts_a_shared_token_once_for_each_sequence_whatever_its_weight():
    sequences = make_sequences(3, weight=4.0)
    sequences += [sequences[0].scaled(0.125), Sequence(sequences[0].tokens, sequences[0].weights)]
    logps = [by_token(one)[one.learned] for one in sequences]
    weights = [one.weights[one.learned] for one in sequences]
    wanted = {
        "loss": -sum(map(np.dot, logps, weights)) / sum(map(np.sum, weights)),
        "nll": -np.concatenate(logps).mean(),
        "tokens": sum(map(len, logps)),
    }
    for share in (True, False):
        batch = pack_rows(sequences, 24, share=share)
        assert run(sft_loss, by_token(batch), batch) == pytest.approx(wanted)


def test_sums_and_denominators_of_parts_add_up():
    whole = pack_rows(make_sequences(6), 8, num_rows=6)
    logps = by_token(whole)

    def part(rows):
        fields = {
            field.name: getattr(whole, field.name)[rows] for field in dataclasses.fields(whole)
        }
        return jax.device_get(sft_loss(logps[rows], type(whole)(**fields), {}))

    parts = [part(slice(0, 1)), part(slice(1, 6))]
    assert reduce(parts) == pytest.approx(run(sft_loss, logps, whole))


def test_dpo_at_the_reference_is_log_2():
    loss = functools.partial(pair_loss, np.zeros(2, np.float32))
    np.testing.assert_allclose(loss(beta=0.1), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss(beta=2.0, label_smoothing=0.3), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss(beta=0.1, loss_type="ipo"), 25.0, rtol=1e-6)
    np.testing.assert_allclose(loss(beta=0.1, loss_type="simpo"), math.log(2), rtol=1e-6)


def test_pair_losses_follow_their_equations():
    gain = 1.5
    loss = functools.partial(pair_loss, np.float32([gain]), beta=0.5)
    wanted = math.log1p(math.exp(-0.5 * gain))
    assert float(loss()[0]) == pytest.approx(wanted)
    assert float(loss(loss_type="ipo")[0]) == pytest.approx((gain - 1.0) ** 2)
    flipped = math.log1p(math.exp(0.5 * gain))
    assert float(loss(label_smoothing=0.2)[0]) == pytest.approx(0.8 * wanted + 0.2 * flipped)
    simpo = loss(loss_type="simpo", margin=0.3)
    assert float(simpo[0]) == pytest.approx(math.log1p(math.exp(0.3 - 0.5 * gain)))


def test_dpo_pushes_the_two_sides_apart():
    slope = jax.grad(lambda gain: pair_loss(gain, beta=0.1).sum())(np.zeros(1, np.float32))
    assert float(slope[0]) == pytest.approx(-0.05)


class Preferences:
    """Three pairs, one of which shares what both sides learn, their log-probabilities, and
    everything a loss should say, in numpy.
    """

    def __init__(self, share=True):
        sides = make_sequences(6)
        for side in (1, 4):
            start = np.array([3, 1, 4, 1]), np.array([0, 1, 0, 1.0])
            sides[side] = Sequence(
                np.r_[start[0], sides[side].tokens], np.r_[start[1], sides[side].weights]
            )
        pairs = [PairSequences(*sides[place::3]) for place in range(3)]
        assert [pair.parting >= 4 for pair in pairs] == [False, True, False]
        sequences, parts = pair_parts(pairs)
        self.batch = pack_rows(sequences, 20, share=share, parts=parts)
        self.logps = by_token(self.batch)

        def of_parts(measure):
            found = [
                measure(sequences[part.sequence])[part.start : part.stop].sum() for part in parts
            ]
            return np.array(found, np.float32).reshape(3, 3).T  # pairs, kinds of part

        sums = of_parts(lambda one: by_token(one) * one.weights)
        tokens = of_parts(lambda one: one.weights > 0).astype(np.int32)
        reference = (sums + np.random.default_rng(5).normal(0, 1, (3, 3))).astype(np.float32)
        self.extras = {"path_tokens": tokens, "ref_logps": reference}
        # Of whole sides: [2, P].
        self.sums, self.references, self.lengths = (
            (array[:, :2] + array[:, 2:]).T for array in (sums, reference, tokens)
        )

    def run(self, **options):
        loss_fn = functools.partial(preference_loss, **options)
        return run(loss_fn, self.logps, self.batch, self.extras)


def mean_dpo(sums, references, beta):
    gain = (sums[0] - references[0]) - (sums[1] - references[1])
    return np.log1p(np.exp(-beta * gain)).mean()


@pytest.mark.parametrize("share", [True, False])
def test_preference_loss_and_its_metrics(share):
    data = Preferences(share)
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


def test_simpo_has_means_per_token_a_margin_and_no_reference():
    data = Preferences()
    del data.extras["ref_logps"]
    metrics = data.run(beta=2.0, loss_type="simpo", margin=0.4)
    gain = np.subtract(*(data.sums / data.lengths))
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(0.4 - 2.0 * gain)).mean(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx((2.0 * gain).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": 0.1, "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"beta": 0.1, "loss_type": "hinge"}, "one of sigmoid, ipo, simpo; got 'hinge'"),
        ({"beta": 0.1, "loss_type": "ipo", "label_smoothing": 0.1}, "with loss_type 'sigmoid'"),
        ({"beta": 0.1, "margin": 0.1}, "margin goes with loss_type 'simpo', not 'sigmoid'"),
        ({"beta": 0.1, "loss_type": "simpo", "margin": -0.1}, "margin must not be negative"),
        ({"beta": 0.1, "sft_weight": -1.0}, "sft_weight must not be negative"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Preferences().run(**options)


@pytest.mark.parametrize("name", ["ref_logps", "path_tokens"])
def test_missing_extras_are_named(name):
    data = Preferences()
    del data.extras[name]
    with pytest.raises(KeyError, match=name):
        data.run(beta=0.1)
