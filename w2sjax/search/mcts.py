"""Monte-Carlo tree search on a fixed tree: UCT, or PUCT where priors are given."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from w2sjax.search import parallel, sequential
from w2sjax.search.batched import batched
from w2sjax.trees.build import end_values
from w2sjax.trees.compress import compress_chains
from w2sjax.types import TrajectoryTree

FORMS = ("parallel", "sequential")
# On CPU a batch is searched in parts whose state stays in the cache: this many branchings.
_CPU_PART = 2**13
_LARGE = 128  # branchings in a batch from which a second program, for what is usual, pays


@chex.dataclass(frozen=True)
class SearchResult:
    """What the simulations left at every node."""

    node_visits: chex.Array  # int32 [N], simulations through the node
    value_sum: chex.Array  # float [N], sum of what they returned, discounted to the node
    stop_visits: chex.Array  # int32 [N], simulations that ended at the node

    @property
    def node_values(self) -> chex.Array:
        """Mean value of each node, float [N]; 0 where `node_visits` is 0."""
        return self.value_sum / jnp.maximum(self.node_visits, 1).astype(self.value_sum.dtype)


def run_mcts(
    tree: TrajectoryTree,
    *,
    num_simulations: int,
    exploration_weight: float = 1.41,
    discount: float = 1.0,
    stop_as_child: bool = True,
    priors: chex.Array | None = None,
    form: str = "parallel",
) -> SearchResult:
    """Runs simulations of UCT (or PUCT) on the tree and returns what they left.

    A simulation starts at the root and takes, at each node, the child of highest score until it
    comes to an end, whose value is the mean return of the trajectories that end there; the value,
    discounted, is added to every node of the path. The score of child c at a node whose children
    were visited Σ times is

        UCT:   Q(c) + w·sqrt(ln Σ / N(c)), an unvisited child first
        PUCT:  Q(c) + w·P(c)·sqrt(Σ) / (1 + N(c)), where Q is 0 for an unvisited child

    ties going to the first child. Where trajectories end at an inner node, stopping is one more
    child, in front of the others. (Kocsis & Szepesvári 2006; Silver et al. 2017; offline as in
    arXiv 2507.18858.)

    Args:
      tree: one tree of capacity N; `jax.vmap` for many.
      num_simulations: k.
      exploration_weight: w.
      discount: γ ≤ 1 per step; Q(c) = γ·mean value of c, and for stopping the plain value.
      stop_as_child: False ignores ends at inner nodes, as the paper's reference code does.
      priors: float [N], prior of the step into each node (`step_priors`); turns on PUCT. The prior
        of stopping is what is left over, 1 − Σ priors of the children, not below 0.
      form: "parallel" plays all branchings at once, in k + height steps; "sequential" one
        simulation after the other. They differ in speed, not in result; on CPU the parallel form
        was the faster one at every size tried (`benchmarks/search.py`).

    Returns:
      `SearchResult`; all zeros for a tree without trajectories.
    """
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}; known: {', '.join(FORMS)}")
    num_nodes = tree.parent.shape[0]
    table = compress_chains(tree, stop_as_child=stop_as_child)
    slot_priors = None
    if priors is not None:
        priors = jnp.asarray(priors)
        chex.assert_shape(priors, (num_nodes,))
        up = jnp.where(tree.parent >= 0, tree.parent, num_nodes)
        rest = 1 - jnp.zeros((num_nodes,), priors.dtype).at[up].add(priors, mode="drop")
        stop_prior = jnp.maximum(rest, 0)[table.slot_entry]
        slot_priors = jnp.where(table.slot_stop, stop_prior, priors[table.slot_entry])
    search = batched(
        functools.partial(
            _in_parts,
            num_simulations=num_simulations,
            exploration_weight=exploration_weight,
            discount=discount,
            form=form,
            # Every branching is one step deeper than the one above it, at least.
            max_depth=min(table.node.shape[0] - 1, tree.trajectory_node.shape[1] - 1),
        )
    )
    counts = search(jax.lax.stop_gradient((table, slot_priors)))
    return _expand(tree, table, counts, num_simulations, discount)


def _in_parts(inputs, **options):
    """`_slot_visits` of a batch, on CPU of one part after the other."""
    num_trees, num_branchings = inputs[0].node.shape
    number = 1
    if jax.default_backend() == "cpu":
        number = min(num_trees, -(-num_trees * num_branchings // _CPU_PART))
    if number <= 1:
        return _slot_visits(inputs, **options)
    size = -(-num_trees // number)
    padding = number * size - num_trees

    def cut(x):
        # Rows of zeros are trees without branchings.
        x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)])
        return x.reshape(number, size, *x.shape[1:])

    search = functools.partial(_slot_visits, **options)
    counts = jax.lax.map(search, jax.tree.map(cut, inputs))
    return counts.reshape(number * size, *counts.shape[2:])[:num_trees]


def _slot_visits(inputs, *, num_simulations, exploration_weight, discount, form, max_depth):
    """Visits of every choice, int32 [B, S], by the form and the sizes that fit."""
    table, _ = inputs
    num_trees, num_branchings = table.node.shape
    options = dict(
        num_simulations=num_simulations,
        exploration_weight=exploration_weight,
        discount=discount,
    )
    if form == "sequential":
        # No branching has more choices than there are trajectories; few have more than eight.
        widths = [min(8, num_branchings + 1), num_branchings + 1]
        narrow, wide = (
            functools.partial(sequential.slot_visits, width=width, **options) for width in widths
        )
        return jax.lax.cond(
            jnp.max(table.num_slots) <= widths[0],
            lambda inputs: narrow(*inputs),
            lambda inputs: wide(*inputs),
            inputs,
        )
    options["max_depth"] = max_depth
    general = parallel.general_groups(num_trees, num_branchings)
    if num_trees * num_branchings < _LARGE:
        return parallel.slot_visits(*inputs, groups=general, **options)
    usual = parallel.usual_groups(num_trees, num_branchings)
    return jax.lax.cond(
        parallel.fits(table.num_slots, usual),
        lambda inputs: parallel.slot_visits(*inputs, groups=usual, **options),
        lambda inputs: parallel.slot_visits(*inputs, groups=general, **options),
        inputs,
    )


def _expand(tree, table, counts, num_simulations, discount):
    """From the visits of choices to those of nodes, and their value sums."""
    num_nodes = tree.parent.shape[0]
    values, _ = end_values(tree)
    dtype = values.dtype
    gamma = jnp.asarray(discount, dtype)
    is_end = table.slot_child < 0

    # Value sums follow from the counts, bottom up; nothing that search has rounded enters.
    def up(sums, slot):
        below = jnp.where(is_end[slot], ends[slot], sums[table.slot_child[slot]])
        gain = below * gamma ** table.slot_steps[slot].astype(dtype)
        return sums.at[table.slot_branching[slot]].add(gain), below

    ends = counts.astype(dtype) * table.slot_value
    slots = jnp.arange(counts.shape[0])
    start = jnp.zeros(table.node.shape, dtype)
    sums, slot_sums = jax.lax.scan(up, start, slots, reverse=True)

    # At the ends of chains; the chain of the root is nobody's choice.
    present = tree.data_count[0] > 0
    top = table.chain_end[0]
    all_visits = jnp.where(present, num_simulations, 0)
    top_sum = jnp.where(table.num_branchings > 0, sums[0], all_visits.astype(dtype) * values[top])
    at = jnp.where(table.slot_mask & ~table.slot_stop, table.slot_end, num_nodes)
    end_visits = jnp.zeros((num_nodes,), jnp.int32).at[at].set(counts, mode="drop")
    end_sums = jnp.zeros((num_nodes,), dtype).at[at].set(slot_sums, mode="drop")
    end_visits, end_sums = end_visits.at[top].set(all_visits), end_sums.at[top].set(top_sum)

    steps = (tree.depth[table.chain_end] - tree.depth).astype(dtype)
    node_visits = end_visits[table.chain_end]
    exists = jnp.arange(num_nodes) < tree.num_nodes
    stops = jnp.where(table.slot_stop, table.node[table.slot_branching], num_nodes)
    stop_visits = jnp.where(tree.num_children == 0, node_visits, 0)
    return SearchResult(
        node_visits=jnp.where(exists, node_visits, 0),
        value_sum=jnp.where(exists, end_sums[table.chain_end] * gamma**steps, 0),
        stop_visits=jnp.where(exists, stop_visits.at[stops].set(counts, mode="drop"), 0),
    )
