"""Trees of hand-written rollouts, and the targets made of them, against slow Python."""

import dataclasses
import math

import jax
import ml_collections
import numpy as np
import pytest

from w2sjax import trees
from w2sjax.config import default_config
from w2sjax.pipeline.forest import (
    build_forest,
    load_forest,
    make_targets,
    room,
    save_forest,
    search_forest,
)
from w2sjax.types import Status, Step, Trajectory

LONG = [f"y{t}" for t in range(1, 12)]
BROKEN = (Status.ENV_ERROR, Status.POLICY_ERROR)
ROLLOUTS = [  # (task, actions, how it ended, score), in the canonical order
    ("stop", "a b c", Status.FAILED, 0.0),
    ("stop", "a b", Status.SUCCESS, 1.0),  # a prefix of the failure above
    ("stop", "d", Status.STEP_LIMIT, 0.0),
    ("broken", "a", Status.ENV_ERROR, 0.0),
    ("dead", "a", Status.FAILED, 0.0),
    ("dead", "b c", Status.FAILED, 0.0),
    ("half", "a b", Status.FAILED, 0.5),
    ("half", " ".join(["a"] * 30), Status.ENV_ERROR, 0.0),  # longer than any scored one
    ("half", "a c", Status.FAILED, 0.0),
    ("half", "e", Status.TOKEN_LIMIT, 0.1),
    ("fork", "a x1 x2", Status.SUCCESS, 1.0),
    ("fork", " ".join(["a", *LONG]), Status.STEP_LIMIT, 0.0),
    ("fork", "a x1 z", Status.FAILED, 0.5),
    ("fork", "a x1 x2", Status.SUCCESS, 1.0),
    ("fork", "b c", Status.FAILED, 0.0),
    ("fork", "b d e", Status.FAILED, 0.2),
    ("fork", "a x1", Status.POLICY_ERROR, 0.0),
    ("far", "a", Status.SUCCESS, 1.0),
    ("far", "b c0", Status.FAILED, 0.4),
    *[("far", f"b c{i}", Status.FAILED, 0.0) for i in range(1, 7)],  # rarely searched
    *[("twice", "m n o", Status.SUCCESS, 1.0)] * 2,
    *[("wide", f"p{i} q", Status.SUCCESS, 1.0) for i in range(4)],
    *[("wide", f"r{i} s", Status.FAILED, 0.0) for i in range(4)],
]
SCORED_TASKS = ("stop", "dead", "half", "fork", "far", "twice", "wide")


def episode(task, actions, status, score, rollout=0):
    steps = tuple(Step(f"Action: {a}", a, f"{a} was done") for a in actions.split())
    return Trajectory(
        task_id=task,
        rollout=rollout,
        env="hand",
        policy="weak",
        seed=0,
        instruction="Act.",
        first_observation="A place.",
        steps=steps,
        status=status,
        score=score,
    )


EPISODES = [episode(*r, rollout=i) for i, r in enumerate(ROLLOUTS)]
TASK = [t.task_id for t in EPISODES]
PATH = [tuple(s.action for s in t.steps) for t in EPISODES]


class Oracle:
    """Values of prefixes of actions by looking at all of a task's scored rollouts."""

    def __init__(self, task):
        of_task = [e for e, t in enumerate(EPISODES) if t.task_id == task and t.status.scored]
        self.scores = [(PATH[e], EPISODES[e].score) for e in of_task]

    def prefixes(self):
        return sorted({path[:n] for path, _ in self.scores for n in range(len(path) + 1)})

    def mean(self, prefix):
        return np.mean([score for path, score in self.scores if path[: len(prefix)] == prefix])

    def best(self, prefix):
        ends = {path for path, _ in self.scores if path[: len(prefix)] == prefix}
        return max(np.mean([s for path, s in self.scores if path == end]) for end in ends)

    def children(self, prefix):
        return [p for p in self.prefixes() if p[:-1] == prefix and len(p) == len(prefix) + 1]


ORACLES = {task: Oracle(task) for task in SCORED_TASKS}


def settings(**changes):
    c = default_config().targets
    c.min_value_gap = 0.3
    c.max_pairs_per_node = 8
    c.update(changes)
    return ml_collections.FrozenConfigDict(c)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These tests run each program once, so nearly all of their time is compiling."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def forest():
    return build_forest(EPISODES, merge_on="action_observation")


@pytest.fixture(scope="module")
def values(forest):
    """With so few simulations that the poor branch of "far" is not seen whole."""
    return search_forest(forest, num_simulations=20, exploration_weight=1.41, discount=1.0)


@pytest.fixture(scope="module")
def made(forest, values):
    return make_targets(forest, values, settings(), seed=0)


@pytest.fixture(scope="module")
def made_otherwise(forest, values):
    """Another seed, other values to pair, and a best path must return more than in "half"."""
    changed = settings(best_path_min_return=0.5, pair_values="mcts")
    return make_targets(forest, values, changed, seed=1)


def tree_of(forest, row):
    return trees.TrajectoryTree(
        **{f.name: getattr(forest.tree, f.name)[row] for f in dataclasses.fields(forest.tree)}
    )


# ------------------------------------------------------------------------------------- trees


def test_rollouts_that_broke_are_in_no_tree_and_all_others_are(forest):
    rows = [[e for e in row if e >= 0] for row in forest.episode.tolist()]
    scored = [e for e, t in enumerate(EPISODES) if t.status not in BROKEN]
    assert [e for row in rows for e in row] == scored
    assert [TASK[row[0]] for row in rows] == list(SCORED_TASKS)
    assert all({TASK[e] for e in row} == {TASK[row[0]]} for row in rows)
    assert forest.num_episodes == len(EPISODES)
    assert forest.tree.overflow.sum() == 0
    assert forest.tree.trajectory_node.shape[-1] - 1 == 1 + len(LONG)  # not the broken one's 30
    for b, r in np.argwhere(forest.mask):
        e = forest.episode[b, r]
        assert forest.length[b, r] == len(PATH[e])
        assert forest.score[b, r] == np.float32(EPISODES[e].score)
        assert forest.success[b, r] == EPISODES[e].success
    for array in (forest.length, forest.score, forest.success):
        assert not array[~forest.mask].any()


def test_every_prefix_is_one_node_with_its_ends_and_values(forest, values):
    for row, task in enumerate(SCORED_TASKS):
        tree, oracle = tree_of(forest, row), ORACLES[task]
        trees.check_invariants(tree)
        assert tree.num_nodes == len(oracle.prefixes())
        for r in np.flatnonzero(forest.mask[row]):
            path = PATH[forest.episode[row, r]]
            for t in range(len(path) + 1):
                node, prefix = tree.trajectory_node[r, t], path[:t]
                ends = [score for p, score in oracle.scores if p == prefix]
                assert tree.terminal_count[node] == len(ends)
                assert tree.terminal_return_sum[node] == pytest.approx(sum(ends))
                mean, best = values["mean_values"][row, node], values["max_values"][row, node]
                assert mean == pytest.approx(oracle.mean(prefix), abs=1e-6)
                assert best == pytest.approx(oracle.best(prefix), abs=1e-6)


def test_a_task_with_fewer_rollouts_has_the_tree_that_it_has_alone(forest):
    row = SCORED_TASKS.index("half")
    assert 0 < forest.mask[row].sum() < forest.mask.shape[1]
    alone = build_forest([t for t in EPISODES if t.task_id == "half"], merge_on="action")
    count = int(alone.tree.num_nodes[0])
    assert forest.tree.num_nodes[row] == count
    for field in dataclasses.fields(trees.TrajectoryTree):
        ours, theirs = (getattr(f.tree, field.name)[i] for f, i in ((forest, row), (alone, 0)))
        if field.name == "step_key":
            continue  # numbers of another table
        if field.name == "trajectory_node":
            ours = ours[: theirs.shape[0], : theirs.shape[1]]
        elif ours.ndim:
            ours, theirs = ours[:count], theirs[:count]
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
    assert (forest.tree.trajectory_node[row, ~forest.mask[row]] == -1).all()


def test_malformed_answers_merge_on_their_text_and_are_no_action():
    """Only the answers differ: what is observed is the same."""

    def one(rollout, answer, action):
        step = Step(answer, action, "Nothing.")
        return dataclasses.replace(EPISODES[0], rollout=rollout, steps=(step,))

    rollouts = [
        one(0, "look", None),
        one(1, "look", None),
        one(2, "Action: look", "look"),
        one(3, "Thought: hm\nAction: look", "look"),
        one(4, "look!", None),
    ]
    tree = build_forest(rollouts, merge_on="action_observation").tree
    assert tree.trajectory_node[0, :, 1].tolist() == [1, 1, 2, 2, 3]


def test_without_a_scored_rollout_there_is_no_forest():
    broken = [t for t in EPISODES if t.status in BROKEN]
    with pytest.raises(ValueError, match=f"none of the {len(broken)} rollouts was scored"):
        build_forest(broken, merge_on="action")


def test_a_forest_is_read_as_it_was_written(forest, tmp_path):
    save_forest(tmp_path / "trees.npz", forest)
    read = load_forest(tmp_path / "trees.npz")
    assert read.num_episodes == forest.num_episodes
    for name in ("episode", "length", "score", "success", "mask"):
        np.testing.assert_array_equal(getattr(read, name), getattr(forest, name), err_msg=name)
        assert getattr(read, name).dtype == getattr(forest, name).dtype
    for field in dataclasses.fields(trees.TrajectoryTree):
        one, other = getattr(read.tree, field.name), getattr(forest.tree, field.name)
        np.testing.assert_array_equal(one, other, err_msg=field.name)
        assert one.dtype == other.dtype


# -------------------------------------------------------------------------------------- room


def gate(**changes):
    c = default_config().gate
    c.min_sampled_success, c.max_sampled_success = 0.0, 1.0
    c.min_tasks_with_success = c.min_shared_steps = 0.0
    c.update(changes)
    return c


def test_room_counts(forest):
    facts = room(forest, gate())
    scored = [t for t in EPISODES if t.status.scored]
    nodes = sum(len(oracle.prefixes()) - 1 for oracle in ORACLES.values())
    steps = sum(len(t.steps) for t in scored)
    assert facts["tasks"] == len(SCORED_TASKS) and facts["rollouts"] == len(scored)
    outcomes = [{t.success for t in scored if t.task_id == task} for task in SCORED_TASKS]
    for name, value in (
        ("sampled_success", np.mean([t.success for t in scored])),
        ("sampled_reward", np.mean([t.score for t in scored])),
        ("tasks_with_success", np.mean([True in found for found in outcomes])),
        ("tasks_with_success_and_failure", np.mean([len(found) == 2 for found in outcomes])),
        ("shared_steps", 1 - nodes / steps),
    ):
        assert facts[name] == pytest.approx(value, abs=5.1e-5), name
    assert facts["warnings"] == []


@pytest.mark.parametrize(
    ("threshold", "fact", "beyond"),
    [
        ("min_sampled_success", "sampled_success", 1e-3),
        ("max_sampled_success", "sampled_success", -1e-3),
        ("min_tasks_with_success", "tasks_with_success", 1e-3),
        ("min_shared_steps", "shared_steps", 1e-3),
    ],
)
def test_room_warns_exactly_when_a_threshold_is_crossed(forest, threshold, fact, beyond):
    value = room(forest, gate())[fact]
    assert room(forest, gate(**{threshold: value}))["warnings"] == []
    (warning,) = room(forest, gate(**{threshold: value + beyond}))["warnings"]
    assert warning.startswith(f"{fact} is {value}") and str(value + beyond) in warning


def test_two_equal_rollouts_save_half_of_their_steps(forest):
    row = slice(SCORED_TASKS.index("twice"), SCORED_TASKS.index("twice") + 1)
    arrays = {n: getattr(forest, n)[row] for n in ("episode", "length", "score", "success")}
    alone = dataclasses.replace(forest, tree=tree_of(forest, row), **arrays)
    facts = room(alone, gate())
    assert (facts["tasks"], facts["rollouts"]) == (1, 2)
    assert facts["shared_steps"] == 0.5
    assert facts["nodes_per_tree"] == 3


# ----------------------------------------------------------------------------- step weights


def weighted(targets, name):
    """Episode → weights of its steps; and nothing past its end."""
    (arrays, counts) = targets[name]
    rows = arrays["step_weights"]
    assert rows.shape[0] == len(EPISODES) and rows.dtype == np.float32
    for row, path in zip(rows, PATH, strict=True):
        assert not row[len(path) :].any()
    used = {e: rows[e, : len(PATH[e])] for e in np.flatnonzero(rows.any(axis=1)).tolist()}
    assert counts["episodes"] == len(used) == len(EPISODES) - counts["left_out_episodes"]
    assert counts["steps"] == (rows > 0).sum()
    return used


def learned_paths(targets, name):
    """Task → the actions that are learned, one tuple per used episode."""
    found = {}
    for e, row in weighted(targets, name).items():
        length = int((row > 0).sum())
        assert (row[:length] == 1).all()  # a prefix, each step once
        found.setdefault(TASK[e], []).append(PATH[e][:length])
    return found


def test_sft_all_learns_every_scored_rollout_whole(made):
    used = weighted(made, "sft_all")
    assert list(used) == [e for e, t in enumerate(EPISODES) if t.status.scored]
    assert all((row == 1).all() for row in used.values())


def test_sft_success_learns_every_success_whole(made):
    used = weighted(made, "sft_success")
    assert list(used) == [e for e, t in enumerate(EPISODES) if t.success]
    assert all((row == 1).all() for row in used.values())


def test_mcts_learns_one_best_path_per_tree(made):
    """In "stop", the success is a prefix of a failure: nothing after the success is learned."""
    paths = learned_paths(made, "mcts")
    assert paths.pop("wide") in [[(f"p{i}", "q")] for i in range(4)]
    assert paths == {
        "stop": [("a", "b")],
        "half": [("a", "b")],
        "fork": [("a", "x1", "x2")],
        "far": [("a",)],
        "twice": [("m", "n", "o")],
    }


def test_a_best_path_that_returned_too_little_is_not_learned(made_otherwise):
    assert set(learned_paths(made_otherwise, "mcts")) == {"stop", "fork", "far", "twice", "wide"}


def test_tree_awr_weighs_every_step_by_its_advantage(made):
    used = weighted(made, "tree_awr")
    beta, most = settings().awr_beta, settings().awr_max_weight
    weight_of = {}
    for e, trajectory in enumerate(EPISODES):
        if not trajectory.status.scored:
            assert e not in used
            continue
        oracle = ORACLES[TASK[e]]
        for t in range(len(PATH[e])):
            prefix = PATH[e][: t + 1]
            advantage = oracle.mean(prefix) - oracle.mean(prefix[:-1])
            alive = oracle.best(prefix) > 0
            got = used[e][t] if e in used else 0.0
            assert got == pytest.approx(alive * min(math.exp(advantage / beta), most), rel=1e-4)
            weight_of[TASK[e], prefix] = got
    assert not any(task == "dead" and weight for (task, _), weight in weight_of.items())
    compared = 0
    for task, oracle in ORACLES.items():
        for parent in oracle.prefixes():
            children = oracle.children(parent)
            for one in children:
                for other in children:
                    if oracle.mean(one) > oracle.mean(other):
                        assert weight_of[task, one] > weight_of[task, other]
                        compared += 1
    assert compared >= 8


# ------------------------------------------------------------------------------------- pairs


def pairs_of(targets, name):
    arrays, counts = targets[name]
    names = ("chosen", "rejected", "start", "chosen_end", "rejected_end", "value_gap")
    pairs = list(zip(*(arrays[n].tolist() for n in names), strict=True))
    assert counts["pairs"] == len(pairs)
    assert counts["tasks_with_pairs"] == len({TASK[p[0]] for p in pairs})
    for chosen, rejected, start, chosen_end, rejected_end, _ in pairs:
        assert TASK[chosen] == TASK[rejected]
        assert EPISODES[chosen].status.scored and EPISODES[rejected].status.scored
        assert start < chosen_end <= len(PATH[chosen])
        assert start < rejected_end <= len(PATH[rejected])
        assert rejected_end <= chosen_end + settings().rejected_extra_steps
    return pairs


def test_dpo_pairs_successes_with_failures_of_the_same_task(made):
    pairs = pairs_of(made, "dpo")
    for chosen, rejected, start, chosen_end, rejected_end, gap in pairs:
        assert EPISODES[chosen].success and not EPISODES[rejected].success
        assert start == 0 and chosen_end == len(PATH[chosen])
        assert rejected_end == min(len(PATH[rejected]), chosen_end + 5)
        assert gap == pytest.approx(EPISODES[chosen].score - EPISODES[rejected].score)
    in_pairs = {e for pair in pairs for e in pair[:2]}
    both = ("stop", "fork", "far", "wide")
    assert in_pairs == {e for e, t in enumerate(EPISODES) if t.task_id in both and t.status.scored}
    assert (10, 11) in {p[:2] for p in pairs} or (13, 11) in {p[:2] for p in pairs}  # it is cut


def test_tree_dpo_pairs_part_where_the_tree_does(made):
    """The pairs are, prefix by prefix, the best child against each that is worse by the gap."""
    gap_wanted = settings().min_value_gap
    expected = []
    for task, oracle in ORACLES.items():
        for parent in oracle.prefixes():
            children = oracle.children(parent)
            if children:
                top = max(map(oracle.best, children))
                expected += [
                    (task, parent, child)
                    for child in children
                    if top - oracle.best(child) >= gap_wanted
                ]
    pairs = pairs_of(made, "tree_dpo")
    found = []
    for chosen, rejected, start, chosen_end, rejected_end, gap in pairs:
        oracle = ORACLES[TASK[chosen]]
        better, worse = PATH[chosen][: start + 1], PATH[rejected][: start + 1]
        assert better[:-1] == worse[:-1] and better != worse
        values = oracle.best(better), oracle.best(worse)
        assert values[0] - values[1] >= gap_wanted - 1e-6
        assert gap == pytest.approx(values[0] - values[1], abs=1e-6)
        assert values[0] == max(map(oracle.best, oracle.children(better[:-1])))
        assert EPISODES[chosen].score == pytest.approx(values[0])  # the text is its best one
        assert chosen_end == len(PATH[chosen])
        assert rejected_end == min(len(PATH[rejected]), chosen_end + 5)
        found.append((TASK[chosen], better[:-1], worse))
    assert sorted(found) == sorted(expected)
    assert ("fork", ("a", "x1"), ("a", "x1", "z")) in found  # deep
    assert any(p[4] < len(PATH[p[1]]) for p in pairs)  # ETO's cut
    parents = {(task, parent) for task, parent, _ in found}
    assert ("fork", ("b",)) not in parents  # 0.2 against 0: below the gap
    assert ("stop", ("a", "b")) not in parents  # stopping has no text


def test_pairs_of_search_values_have_two_visited_sides(forest, values, made, made_otherwise):
    """What the search has not seen has no value of its own."""
    place = {e: where for where, e in np.ndenumerate(forest.episode) if e >= 0}

    def at_sides(pairs, name):
        """The search's `name` at the nodes behind the parting, [pairs, 2]."""
        return np.array(
            [
                [
                    values[name][place[e][0], forest.tree.trajectory_node[place[e]][start + 1]]
                    for e in sides
                ]
                for *sides, start, _, _, _ in pairs
            ]
        )

    pairs = pairs_of(made_otherwise, "tree_dpo")
    assert pairs and at_sides(pairs, "node_visits").min() > 0
    q = at_sides(pairs, "mcts_values")
    np.testing.assert_allclose([p[-1] for p in pairs], q[:, 0] - q[:, 1], atol=1e-6)
    # The law could have failed: best values do pair unvisited nodes, and of those that the search
    # left at 0, some have a visited sibling that is better by more than the gap.
    others = pairs_of(made, "tree_dpo")
    visits, q = at_sides(others, "node_visits"), at_sides(others, "mcts_values")
    unseen = visits[:, 1] == 0
    assert (q[unseen, 0] - q[unseen, 1] >= settings().min_value_gap).any()


def test_targets_are_a_function_of_the_seed(forest, values, made, made_otherwise):
    again = make_targets(forest, values, settings(), seed=0)
    assert set(again) == set(made)
    for name, (arrays, counts) in made.items():
        assert again[name][1] == counts
        for field, array in arrays.items():
            np.testing.assert_array_equal(again[name][0][field], array, err_msg=f"{name} {field}")

    def matching(targets):
        return {p[:2] for p in pairs_of(targets, "dpo") if TASK[p[0]] == "wide"}

    assert matching(made) != matching(made_otherwise)
