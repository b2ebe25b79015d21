"""From episodes to examples, and DPO's frozen start."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

from w2sjax.batches import PairSequences, Sequence, pack_rows, token_nodes
from w2sjax.chat import ChatTemplate, format_answer, train_bpe
from w2sjax.checkpoints import load_params
from w2sjax.config import default_config
from w2sjax.envs import EnvPool, PlayRequest
from w2sjax.pipeline.agents import Agent
from w2sjax.pipeline.training import Examples, Training, to_pairs, to_sequences
from w2sjax.sampling import play_episodes
from w2sjax.types import Status, Step

END = "<|end|>"
NO_LIMIT = 10_000
HOUSEHOLD = {"families": ("look", "put"), "num_object_types": 4, "max_steps": 8}


@pytest.fixture(scope="module")
def episodes():
    """Experts and clumsy players, in a small household: successes, failures, both lengths."""
    with EnvPool("household", HOUSEHOLD, num_slots=1) as pool:
        tasks = pool.task_ids("train", 4)
        requests = [PlayRequest(task, rate, seed=3) for task in tasks for rate in (0.0, 0.6)]
        played = play_episodes(pool, requests, env_name="household", policy_name="player")
    assert len({len(t.steps) for t in played}) > 1 and len({t.success for t in played}) == 2
    return played


@pytest.fixture(scope="module")
def template(episodes):
    texts = [t.first_observation for t in episodes]
    return ChatTemplate(train_bpe(texts, vocab_size=300))


def decode(template, tokens):
    return template.tokenizer.decode(tokens)


def spoken(steps):
    return "".join(step.answer + END for step in steps)


def broken(episode, num_steps):
    """The episode as a crash would leave it, with as many steps as wanted."""
    steps = (episode.steps * num_steps)[:num_steps]
    return dataclasses.replace(
        episode, steps=steps, status=Status.ENV_ERROR, score=0.0, error="its worker died"
    )


# --------------------------------------------------------------------------------- sequences


def test_what_is_learned_is_exactly_what_the_agent_said(template, episodes):
    sequences, groups, too_long = to_sequences(template, episodes, NO_LIMIT)
    assert too_long == 0 and len(sequences) == len(groups) == len(episodes)
    tasks = [episode.task_id for episode in episodes]
    assert [tasks.index(task) for task in tasks] == [groups.index(group) for group in groups]
    for episode, sequence in zip(episodes, sequences, strict=True):
        assert set(sequence.weights.tolist()) == {0.0, 1.0}
        assert decode(template, sequence.tokens[sequence.weights > 0]) == spoken(episode.steps)
        unlearned = decode(template, sequence.tokens[sequence.weights == 0])
        for text in (episode.instruction, episode.first_observation):
            assert text in unlearned
        assert decode(template, sequence.tokens).endswith(episode.steps[-1].answer + END)


def test_step_weights_go_to_their_turns_and_the_rest_is_cut(template, episodes):
    """Weight t + 1 on every step t but some: each weight is then found on its answer alone."""
    rng = np.random.default_rng(0)
    num_steps = max(len(t.steps) for t in episodes)
    weights = np.zeros((len(episodes), num_steps), np.float32)
    for row, episode in zip(weights, episodes, strict=True):
        at = np.arange(len(episode.steps))
        row[at] = (at + 1) * (rng.random(len(at)) < 0.5)
    weights[0] = 0
    weights[1, :2] = [5, 0]
    weights[1, 2:] = 0
    sequences, groups, too_long = to_sequences(template, episodes, NO_LIMIT, step_weights=weights)
    used = [e for e, row in enumerate(weights) if row.any()]
    assert too_long == 0 and len(sequences) == len(used) < len(episodes)
    everything = to_sequences(template, episodes, NO_LIMIT)
    assert groups == [everything.groups[e] for e in used]
    for index, sequence in zip(used, sequences, strict=True):
        episode = episodes[index]
        for t in np.flatnonzero(weights[index]):
            there = sequence.weights == weights[index, t]
            assert decode(template, sequence.tokens[there]) == episode.steps[t].answer + END
        chosen = [episode.steps[t] for t in np.flatnonzero(weights[index])]
        assert decode(template, sequence.tokens[sequence.weights > 0]) == spoken(chosen)
        assert sequence.weights[-1] > 0  # nothing follows the last answer that counts
        whole = template.encode_trajectory(episode).tokens
        np.testing.assert_array_equal(sequence.tokens, whole[: len(sequence)])
    assert decode(template, sequences[used.index(1)].tokens).count(END) == 1


def test_what_was_never_scored_is_never_used(template, episodes):
    """Not even where it is longer than any scored episode, or where all tokens count."""
    num_steps = max(len(t.steps) for t in episodes)
    mixed = [broken(episodes[0], num_steps + 3), *episodes, broken(episodes[1], 0)]
    weights = np.zeros((len(mixed), num_steps), np.float32)
    weights[1:-1] = [np.arange(num_steps) < len(t.steps) for t in episodes]
    for options in ({"step_weights": weights}, {}, {"all_tokens": True}):
        expected = options if "step_weights" not in options else {"step_weights": weights[1:-1]}
        got = to_sequences(template, mixed, NO_LIMIT, **options).items
        wanted = to_sequences(template, episodes, NO_LIMIT, **expected).items
        assert len(got) == len(wanted) == len(episodes)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.weights, other.weights)


def test_too_long_sequences_are_left_out_and_counted(template, episodes):
    whole = to_sequences(template, episodes, NO_LIMIT).items
    lengths = [len(s) for s in whole]
    limit = sorted(lengths)[len(lengths) // 2]  # a sequence of just this length stays
    kept, _, too_long = to_sequences(template, episodes, limit)
    assert [len(s) for s in kept] == [n for n in lengths if n <= limit]
    assert too_long == sum(n > limit for n in lengths) > 0
    # What counts is the length after the cut.
    first_only = np.zeros((len(episodes), max(len(t.steps) for t in episodes)), np.float32)
    first_only[:, 0] = 1
    cut, _, too_long = to_sequences(template, episodes, limit, step_weights=first_only)
    assert len(cut) == len(episodes) and too_long == 0


def test_all_tokens_count_but_the_first(template, episodes):
    sequences = to_sequences(template, episodes, NO_LIMIT, all_tokens=True).items
    for episode, sequence in zip(episodes, sequences, strict=True):
        np.testing.assert_array_equal(sequence.weights, np.arange(len(sequence)) > 0)
        np.testing.assert_array_equal(sequence.tokens, template.encode_trajectory(episode).tokens)


def spelled_out(template, episode):
    """The episode with its first answer in other tokens than the tokenizer's, and these tokens."""
    answer = episode.steps[0].answer
    spelled = [i for c in answer for i in template.tokenizer.encode(c, add_special_tokens=False)]
    spelled.append(template.stop_ids[0])
    assert spelled != template.encode_answer(answer)
    first = dataclasses.replace(episode.steps[0], answer_ids=tuple(spelled), answer_logp=-1.0)
    return dataclasses.replace(episode, steps=(first, *episode.steps[1:])), spelled


def test_sampled_ids_are_trained_on_as_they_were_sampled(template, episodes):
    """A model may spell an answer in other tokens than the tokenizer would."""
    episode = episodes[0]
    sampled, spelled = spelled_out(template, episode)
    weights = np.zeros((1, len(episode.steps)), np.float32)
    weights[0, 0] = 1
    (sequence,) = to_sequences(template, [sampled], NO_LIMIT, step_weights=weights).items
    assert sequence.tokens[sequence.weights > 0].tolist() == spelled


def test_only_equal_tokens_are_shared_whatever_the_text_says(template, episodes):
    """Of one text in different tokens, nothing is shared from the first different token on."""
    sampled, _ = spelled_out(template, episodes[0])
    one, other = to_sequences(template, [episodes[0], sampled], NO_LIMIT).items
    assert decode(template, one.tokens) == decode(template, other.tokens)
    shorter = min(len(one), len(other))
    shared = int(np.argmax(one.tokens[:shorter] != other.tokens[:shorter]))
    assert 0 < shared < shorter
    total = len(one) + len(other) - shared
    batch = pack_rows([one, other, one], total)
    assert batch.tokens.shape == (1, total)
    nodes = [batch.tokens[0, token_nodes(batch)[0] == node].tolist() for node in range(3)]
    assert nodes[0] == one.tokens[:shared].tolist()
    assert sorted(nodes[1:]) == sorted(
        [one.tokens[shared:].tolist(), other.tokens[shared:].tolist()]
    )


# ------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def parting(episodes):
    """Two episodes of one task that part at step 1, the second one the longer."""
    good = next(t for t in episodes if t.success and len(t.steps) >= 4)
    idle = Step(format_answer("look"), "look", "A room.")
    bad = dataclasses.replace(
        good, rollout=1, steps=good.steps[:1] + (idle,) * len(good.steps), status=Status.FAILED
    )
    return [good, bad]


def pair_arrays(rows):
    names = ("chosen", "rejected", "start", "chosen_end", "rejected_end")
    return {n: np.array(c, np.int32) for n, c in zip(names, zip(*rows, strict=True), strict=True)}


def test_pairs_are_learned_from_where_they_part_to_their_ends(template, parting):
    rows = [(0, 1, 1, 3, 5), (0, 1, 1, 2, 2), (1, 0, 0, 2, 4)]
    pairs, groups, too_long = to_pairs(template, parting, NO_LIMIT, pair_arrays(rows))
    assert too_long == 0 and groups == [0, 0, 0]
    for (chosen, rejected, start, chosen_end, rejected_end), pair in zip(rows, pairs, strict=True):
        for side, index, end in (
            (pair.chosen, chosen, chosen_end),
            (pair.rejected, rejected, rejected_end),
        ):
            learned = decode(template, side.tokens[side.weights > 0])
            assert learned == spoken(parting[index].steps[start:end])
            assert set(side.weights.tolist()) == {0.0, 1.0} and side.weights[-1] == 1
        starts = [int(np.argmax(side.weights > 0)) for side in (pair.chosen, pair.rejected)]
        assert starts[0] == starts[1]
        context = pair.chosen.tokens[: starts[0]]
        np.testing.assert_array_equal(context, pair.rejected.tokens[: starts[1]])
        said = decode(template, context)
        assert said.count(END) == start and parting[0].first_observation in said


def test_pairs_with_a_side_too_long_are_left_out_and_counted(template, parting):
    rows = [(0, 1, 1, 2, 4), (0, 1, 1, 3, 2), (0, 1, 1, 2, 2)]
    whole = to_pairs(template, parting, NO_LIMIT, pair_arrays(rows)).items
    longest = [max(len(p.chosen), len(p.rejected)) for p in whole]
    limit = longest[2]
    assert longest[0] > limit < longest[1]
    kept, _, too_long = to_pairs(template, parting, limit, pair_arrays(rows))
    assert too_long == 2 and len(kept) == 1
    np.testing.assert_array_equal(kept[0].rejected.tokens, whole[2].rejected.tokens)


# ---------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def tiny_training():
    """A tiny model; its programs run a few times only, so they are compiled in haste."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    c = default_config()
    c.models.strong = "tiny"
    c.models.max_length = 24
    c.models.compute_dtype = "float32"
    c.mesh.data = 1
    c.train.pairs = 3
    c.train.chosen_sft_weight = 0.0
    c.train.preference_learning_rate = 3e-2
    c.train.warmup_steps = 0
    training = Training(c)
    template = types.SimpleNamespace(vocab_size=32)
    yield training, Agent("strong", c, training.mesh, template)
    jax.config.update("jax_disable_most_optimizations", before)


def some_pairs(count, vocab_size):
    rng = np.random.default_rng(1)

    def side(context, length):
        tokens = np.concatenate([context, rng.integers(vocab_size, size=length)])
        weights = np.arange(len(tokens)) >= len(context)
        return Sequence(tokens.astype(np.int32), weights.astype(np.float32))

    contexts = rng.integers(vocab_size, size=(count, 5))
    return [PairSequences(chosen=side(c, 4), rejected=side(c, 7)) for c in contexts]


def test_dpo_starts_at_log_2_and_leaves_its_reference_alone(tiny_training, tmp_path):
    (training, agent), vocab_size, steps = tiny_training, 32, 4
    policy, params = agent.init(seed=0)
    before = jax.tree.map(np.array, params)
    facts = training.fit_preference(
        tmp_path,
        "training, dpo",
        agent,
        policy,
        params,
        Examples(some_pairs(3, vocab_size), [0, 0, 1], too_long=2),
        steps=steps,
        seed=0,
        source="the target dpo",
    )
    assert (facts["pairs"], facts["left_out_too_long"]) == (3, 2)
    assert facts["sharing"] > 1  # the sides of a pair have their context in common
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, steps + 1))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["rewards/margins"] > 0
    jax.tree.map(np.testing.assert_array_equal, params, before)
    trained = load_params(tmp_path / "params", jax.eval_shape(lambda: params))
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), trained, before))
    assert any(changed)
    kept = {"metrics.jsonl", "params", "reference_logps.npz"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_packing_changes_no_training(tiny_training, tmp_path, loss):
    """Every update's metrics are those of a trajectory in each row, whatever is learned."""
    training, agent = tiny_training
    c = training.config
    pairs = some_pairs(6, 32)
    pairs += [PairSequences(pairs[i].rejected, pairs[i].chosen) for i in (0, 3)]  # seen twice
    examples = Examples(pairs, [0, 1, 2, 3, 4, 5, 0, 3], 0)
    before = c.to_dict()
    logs = []
    try:
        c.train.preference_loss = loss
        c.train.chosen_sft_weight = 0.5
        for packing in ("tree", "none"):
            c.batches.packing = packing
            directory = tmp_path / packing
            directory.mkdir()
            options = dict(steps=3, seed=0, source="pairs")
            facts = Training(c).fit_preference(
                directory, "x", agent, *agent.init(seed=0), examples, **options
            )
            assert (facts["sharing"] > 1) == (packing == "tree")
            logs.append([json.loads(s) for s in (directory / "metrics.jsonl").open()])
    finally:
        c.update(before)
    for log in logs:
        log[0].pop("rewards/accuracies")  # at the reference, gains are rounding errors
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-5)
    assert (tmp_path / "tree/reference_logps.npz").exists() == (loss != "simpo")


@pytest.mark.parametrize(("too_long", "says"), [(0, "no example"), (7, "all 7 examples")])
def test_a_stage_without_examples_names_itself_and_its_source(
    tiny_training, tmp_path, too_long, says
):
    training, agent = tiny_training
    common = dict(seed=0, source="the target tree_dpo", steps=2)
    nothing = (tmp_path, "training, x", agent, None, None, Examples([], [], too_long))
    with pytest.raises(ValueError) as preference:
        training.fit_preference(*nothing, **common)
    with pytest.raises(ValueError) as sft:
        training.fit_sft(*nothing, learning_rate=1e-3, per_batch=1, **common)
    for caught in (preference, sft):
        for text in ("stage training, x", "the target tree_dpo", says):
            assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_reads_the_text_and_not_the_sampled_ids(tiny_training, episodes):
    _, agent = tiny_training
    sampled = [
        dataclasses.replace(
            e, steps=tuple(dataclasses.replace(step, answer_ids=(1, 2)) for step in e.steps)
        )
        for e in episodes
    ]
    assert agent.as_read(sampled) == sampled
    agent.reads_sampled_ids = False
    read = agent.as_read(sampled)
    agent.reads_sampled_ids = True
    assert all(step.answer_ids is None for e in read for step in e.steps)
    assert [[s.answer for s in e.steps] for e in read] == [
        [s.answer for s in e.steps] for e in sampled
    ]
