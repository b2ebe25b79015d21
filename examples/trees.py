"""Ten hand-written trajectories become a tree, values, a best path and preference pairs.

    python examples/trees.py

The task: bring a clean mug to the desk. Breaking the mug cannot be undone.
"""

from __future__ import annotations

import jax

from w2sjax import search, targets, trees

KITCHEN, SINK, DESK = "go to kitchen", "wash mug", "put mug on desk"
TAKE, BREAK, WAIT = "take mug", "throw mug", "wait"
GO = "go to desk"

# (actions, return). The environment is deterministic, so equal actions mean equal observations.
ROLLOUTS = [
    ([KITCHEN, TAKE, SINK, GO, DESK], 1.0),
    ([KITCHEN, TAKE, GO, DESK], 0.5),
    ([KITCHEN, TAKE, BREAK], 0.0),
    ([KITCHEN, TAKE, SINK, WAIT], 0.5),
    ([KITCHEN, TAKE, SINK, GO, DESK, WAIT], 1.0),
    ([KITCHEN, WAIT, TAKE, BREAK], 0.0),
    ([GO, WAIT], 0.0),
    ([GO, WAIT, WAIT], 0.0),
    ([KITCHEN, TAKE, GO, DESK], 0.5),
    ([KITCHEN, TAKE, SINK, BREAK], 0.0),
]


def main() -> str:
    """Runs the example and returns what it prints."""
    steps = [[(action, "") for action in actions] for actions, _ in ROLLOUTS]
    returns = jax.numpy.array([value for _, value in ROLLOUTS])

    # 1. Text to integer keys, on the host. One task here; a batch of tasks has a leading axis.
    keys = trees.intern_steps([steps], merge_on="action")

    # 2. Keys to a tree of fixed capacity. 1 + R·T nodes always suffice.
    rollouts, longest = keys.step_keys.shape[1:]
    capacity = 1 + rollouts * longest

    @jax.jit
    def work(step_keys, lengths, returns):
        tree = trees.build_tree(step_keys, lengths, returns, max_nodes=capacity)
        # 3. Values: what the rollouts earned on average, at best, and what search makes of them.
        mean = search.backup_mean(tree)
        best = search.backup_max(tree, discount=0.99)
        found = search.run_mcts(tree, num_simulations=1000)
        # 4. What to train on.
        path = search.best_path(tree, best, discount=0.99)
        pairs = targets.branch_pairs(tree, best, max_pairs=8, min_value_gap=0.1)
        return tree, mean, best, found, path, pairs

    tree, mean, best, found, path, pairs = work(keys.step_keys[0], keys.lengths[0], returns)

    def action(trajectory, t):
        return ROLLOUTS[trajectory][0][t]

    def label(node):
        name = action(tree.representative[node], tree.depth[node] - 1) if node else "(start)"
        ends = f", {tree.terminal_count[node]} end here" if tree.terminal_count[node] else ""
        return (
            f"{name}  [{tree.data_count[node]} rollouts{ends}; mean {mean[node]:.2f},"
            f" best {best[node]:.2f}, {found.node_visits[node]} visits]"
        )

    last = int(path.nodes[path.length])
    lines = [trees.draw_tree(tree, label), "", "Best path:"]
    lines += [f"  {t + 1}. {action(tree.representative[last], t)}" for t in range(int(path.length))]
    lines += ["", "Preference pairs (same beginning, better continuation first):"]
    for p in range(int(pairs.num_pairs)):
        start = int(pairs.start[p])
        chosen, rejected = int(pairs.chosen_trajectory[p]), int(pairs.rejected_trajectory[p])
        good = ROLLOUTS[chosen][0][start : int(pairs.chosen_end[p])]
        bad = ROLLOUTS[rejected][0][start : int(pairs.rejected_end[p])]
        shared = " → ".join(ROLLOUTS[chosen][0][:start]) or "(start)"
        lines.append(f"  after {shared}: gap {pairs.value_gap[p]:.2f}")
        lines.append(f"    + {' → '.join(good)}")
        lines.append(f"    − {' → '.join(bad)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(main())
