"""Sequences into rows: which sequence lies in which row, and the arrays a train step reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from w2sjax.types import PackedBatch

# For every row of a plan, the indices of the sequences that lie in it, from left to right.
Plan = list[list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """Token ids and what each of them counts in a loss.

    Attributes:
      tokens: int32 [L], L ≥ 1.
      weights: float32 [L], finite and non-negative: 0 on context, 1 (or the multiplicity or
        importance of the sequence) on what is to be learned. The first one is 0, because nothing
        predicts the first token.

    Raises:
      ValueError: from the constructor, where one of these conditions does not hold.
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens, np.int32)
        weights = np.asarray(self.weights, np.float32)
        if tokens.ndim != 1 or tokens.size == 0 or weights.shape != tokens.shape:
            raise ValueError(
                "Sequence: tokens and weights must be one-dimensional, equally long and not empty; "
                f"got tokens {list(tokens.shape)} and weights {list(weights.shape)}."
            )
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("Sequence: weights must be finite and not negative.")
        if weights[0] != 0:
            raise ValueError(
                "Sequence: weights[0] must be 0, since nothing predicts the first token; "
                f"got {weights[0]}."
            )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "weights", weights)

    def __len__(self) -> int:
        return int(self.tokens.size)

    def scaled(self, factor: float) -> Sequence:
        """The same tokens, all weights times `factor` (a multiplicity or an importance)."""
        return Sequence(self.tokens, self.weights * np.float32(factor))


def check_sequences(
    sequences: SequenceOf[Sequence], row_length: int, *, name: str = "sequences"
) -> None:
    """Checks that a data set can be trained on.

    Args:
      sequences: the data set.
      row_length: tokens in a row.
      name: what the error calls the data set.

    Raises:
      ValueError: if it is empty, or a sequence is longer than a row, or has no weight at all (it
        would be computed and teach nothing); the message names the index.
    """
    if len(sequences) == 0:
        raise ValueError(f"{name} is empty: there is nothing to batch.")
    for index, sequence in enumerate(sequences):
        if len(sequence) > row_length:
            raise ValueError(
                f"{name}[{index}] has {len(sequence)} tokens and does not fit into a row of "
                f"{row_length}: raise row_length, or leave the sequence out and count it."
            )
        if not sequence.weights.any():
            raise ValueError(
                f"{name}[{index}] has weight 0 on every token and would teach nothing: "
                "leave it out."
            )


def plan_rows(lengths: Iterable[int], row_length: int) -> Plan:
    """Lays sequences into rows, one after the other, each into the fullest row that still has room.

    Best fit in the order given: O(n · row_length / 64) through one bit mask of the free lengths at
      hand.
    Give decreasing lengths for the tightest plan, or a random order where rows must not sort by
    length.

    Args:
      lengths: tokens of each sequence, 1 … row_length.
      row_length: tokens in a row.

    Returns:
      The rows in the order in which they were opened; sequences are named by their place in
      `lengths`.

    Raises:
      ValueError: if a sequence is longer than a row; index and both lengths are named.
    """
    plan: Plan = []
    rows_with_free: dict[int, list[int]] = {}  # free length → rows that have exactly so much left
    free_lengths = 0  # bit f set: rows_with_free[f] is not empty
    for index, length in enumerate(lengths):
        _check_length(index, length, row_length)
        fitting = free_lengths >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            rows = rows_with_free[free]
            row = rows.pop()
            if not rows:
                free_lengths &= ~(1 << free)
        else:
            free, row = row_length, len(plan)
            plan.append([])
        plan[row].append(index)
        left = free - length
        if left:
            rows_with_free.setdefault(left, []).append(row)
            free_lengths |= 1 << left
    return plan


def plan_rows_decreasing(lengths: SequenceOf[int], row_length: int) -> Plan:
    """`plan_rows`, longest sequences first (equal ones in the order given): the tightest plan."""
    for index, length in enumerate(lengths):
        _check_length(index, length, row_length)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    plan = plan_rows((lengths[index] for index in order), row_length)
    return [[order[place] for place in row] for row in plan]


def fill_rows(
    sequences: SequenceOf[Sequence],
    plan: SequenceOf[SequenceOf[tuple[int, int]]],
    *,
    num_rows: int,
    row_length: int,
) -> PackedBatch:
    """Writes the arrays of a batch.

    Args:
      sequences: where the tokens come from.
      plan: per row, from left to right, pairs (index into `sequences`, sequence id inside the
        batch).
      num_rows: S, at least len(plan); rows past the plan are padding.
      row_length: L.

    Returns:
      PackedBatch of numpy arrays [S, L].
    """
    shape = (num_rows, row_length)
    tokens = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    subtree_end = np.zeros(shape, np.int32)
    predecessor = np.zeros(shape, np.int32)
    loss_weight = np.zeros(shape, np.float32)
    sequence_id = np.full(shape, -1, np.int32)
    columns = np.arange(row_length, dtype=np.int32)
    for row, members in enumerate(plan):
        start = 0
        for index, identity in members:
            sequence = sequences[index]
            end = start + len(sequence)
            span = slice(start, end)
            tokens[row, span] = sequence.tokens
            positions[row, span] = columns[: len(sequence)]
            subtree_end[row, span] = end
            predecessor[row, start + 1 : end] = columns[start : end - 1]
            loss_weight[row, span] = sequence.weights
            sequence_id[row, span] = identity
            start = end
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        subtree_end=subtree_end,
        predecessor=predecessor,
        loss_weight=loss_weight,
        sequence_id=sequence_id,
    )


def pack_rows(
    sequences: SequenceOf[Sequence], row_length: int, *, num_rows: int | None = None
) -> PackedBatch:
    """Packs one batch, the longest sequences first.

    Args:
      sequences: Q sequences; sequence_id in the result is the place in this list.
      row_length: L.
      num_rows: S, rows of the result; by default the number needed, rounded up to a power of two,
        so that few shapes are ever compiled.

    Returns:
      PackedBatch of numpy arrays [S, L].

    Raises:
      ValueError: if a sequence is longer than a row, or `num_rows` are too few.
    """
    plan = plan_rows_decreasing([len(sequence) for sequence in sequences], row_length)
    if num_rows is None:
        num_rows = 1 << max(len(plan) - 1, 0).bit_length()
    if len(plan) > num_rows:
        raise ValueError(
            f"these sequences need {len(plan)} rows of {row_length}; num_rows is {num_rows}."
        )
    members = [[(index, index) for index in row] for row in plan]
    return fill_rows(sequences, members, num_rows=num_rows, row_length=row_length)


def fill_rate(batch: PackedBatch) -> float:
    """Share of the batch's tokens that are not padding, in [0, 1]."""
    return float(np.mean(np.asarray(batch.sequence_id) >= 0))


def _check_length(index: int, length: int, row_length: int) -> None:
    if not 0 < length <= row_length:
        raise ValueError(f"sequence {index} has {length} tokens; a row holds 1 to {row_length}.")
