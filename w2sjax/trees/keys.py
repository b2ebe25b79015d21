"""Host side: from the text of steps to integer step keys. Equal keys mean equal text, always."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np

# What two steps must have in common to lead to the same node (given that their parents are the
# same node).
MERGE_ON = ("action", "action_observation", "observation_history")

Step = tuple[Hashable, Hashable]  # (action, observation), both usually text


class StepKeys(NamedTuple):
    """Padded keys of B tasks with up to R rollouts of up to T steps, as `build_tree` takes them."""

    step_keys: np.ndarray  # int32 [B, R, T], 0 past the end
    lengths: np.ndarray  # int32 [B, R], steps; 0 where there is no rollout
    mask: np.ndarray  # bool [B, R], False where a task has fewer than R rollouts


class StepInterner:
    """Gives every distinct step a small integer, in order of first appearance.

    The table holds the text itself, not a hash of it, so two different steps never share a key. One
    interner can be kept while trajectories are read one by one; its keys stay valid.

    Args:
      merge_on: "action" (steps are equal when their actions are), "action_observation" (actions
        and the observations that followed), or "observation_history" (observations alone: since a
        node is a prefix of keys, a node then is a history of observations, whichever actions led
        through it; states that are reached by several action sequences are folded together as far
        as their past looks alike).

    Raises:
      ValueError: `merge_on` is none of these.
    """

    def __init__(self, merge_on: str = "action_observation"):
        if merge_on not in MERGE_ON:
            raise ValueError(f"merge_on: got {merge_on!r}; known: {', '.join(MERGE_ON)}")
        self.merge_on = merge_on
        self._table: defaultdict[Hashable, int] = defaultdict(itertools.count().__next__)

    def __len__(self) -> int:
        """Number of distinct steps seen so far."""
        return len(self._table)

    def keys(self, steps: Iterable[Step]) -> Iterable[int]:
        """Yields the key of every step, a tuple (action, observation), lazily."""
        if self.merge_on == "action":
            parts: Iterable[Hashable] = map(itemgetter(0), steps)
        elif self.merge_on == "observation_history":
            parts = map(itemgetter(1), steps)
        else:
            parts = steps
        return map(self._table.__getitem__, parts)


def intern_steps(
    tasks: Sequence[Sequence[Sequence[Step]]],
    *,
    merge_on: str = "action_observation",
    num_rollouts: int | None = None,
    num_steps: int | None = None,
    interner: StepInterner | None = None,
) -> StepKeys:
    """Turns the steps of many tasks into padded integer keys.

    Args:
      tasks: per task its trajectories, per trajectory its steps, each a tuple (action,
        observation).
      merge_on: see `StepInterner`; not used where `interner` is given.
      num_rollouts: R of the result; the largest number of trajectories of a task where None.
      num_steps: T of the result; the longest trajectory where None (at least 1).
      interner: a table to go on with, so that keys of several calls can be compared.

    Returns:
      `StepKeys`, numpy arrays [B, R, T], [B, R], [B, R].

    Raises:
      ValueError: a task has more trajectories than `num_rollouts`, or a trajectory more steps than
        `num_steps`; the message names the task and both numbers.

    Example:
      >>> look, take = ("look", "a desk"), ("take mug 1", "taken")
      >>> intern_steps([[[look, take], [look]]]).step_keys.tolist()
      [[[0, 1], [0, 0]]]
    """
    interner = StepInterner(merge_on) if interner is None else interner
    counts = np.fromiter(map(len, tasks), np.int64, len(tasks))
    rollouts = int(counts.max(initial=0)) if num_rollouts is None else num_rollouts
    if (counts > rollouts).any():
        task = int(np.argmax(counts > rollouts))
        raise ValueError(
            f"tasks[{task}] has {counts[task]} trajectories, but num_rollouts is {rollouts};"
            " raise it"
        )
    mask = np.arange(rollouts) < counts[:, None]
    trajectories = list(itertools.chain.from_iterable(tasks))
    flat_lengths = np.fromiter(map(len, trajectories), np.int32, len(trajectories))
    longest = int(flat_lengths.max(initial=0))
    steps = max(longest, 1) if num_steps is None else num_steps
    if longest > steps:
        index = int(np.argmax(flat_lengths))
        task = int(np.searchsorted(np.cumsum(counts), index, side="right"))
        raise ValueError(
            f"tasks[{task}] has a trajectory of {longest} steps, but num_steps is {steps}; raise it"
        )
    flat = list(itertools.chain.from_iterable(trajectories))
    lengths = np.zeros((len(tasks), rollouts), np.int32)
    lengths[mask] = flat_lengths
    step_keys = np.zeros((len(tasks), rollouts, steps), np.int32)
    step_keys[np.arange(steps) < lengths[..., None]] = np.fromiter(
        interner.keys(flat), np.int32, len(flat)
    )
    return StepKeys(step_keys, lengths, mask)
