"""What a train step sees at step t: a function of (seed, t) alone, at one static shape."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

import numpy as np

from w2sjax.batches.packing import (
    Plan,
    Sequence,
    check_sequences,
    fill_rows,
    plan_rows,
    plan_rows_decreasing,
)
from w2sjax.types import PackedBatch


class LoadedBatch(NamedTuple):
    """One step's input.

    With `micro_batches` = K > 1 every array has a leading axis K.
    """

    batch: PackedBatch  # numpy arrays [S, L] or [K, S/K, L]
    extras: dict[str, np.ndarray]  # per-pair arrays [P] or [K, P/K]; empty for sequences
    ids: np.ndarray  # int64, what the batch is made of: indices into the data set


class Loader(Protocol):
    """What `train.fit` asks of a loader."""

    def batch(self, step: int) -> LoadedBatch:
        """The batch of step `step` (from 0)."""
        ...


@dataclasses.dataclass(frozen=True)
class PairSequences:
    """Two answers to one context: tokens shared by both come first and have weight 0 in both."""

    chosen: Sequence
    rejected: Sequence


class SequenceLoader:
    """Batches for SFT: every epoch is the whole data set, once, in an order of its own.

    An epoch's sequences are permuted, laid into rows by best fit, and the rows are permuted. The
    rows of all epochs form one stream, of which a batch is the next `rows_per_batch`: an epoch's
    last rows share a batch with the next epoch's first, so nothing is dropped and no row is empty.
    """

    def __init__(
        self,
        sequences: SequenceOf[Sequence],
        *,
        rows_per_batch: int,
        row_length: int,
        seed: int,
        micro_batches: int = 1,
    ):
        _check_positive(
            rows_per_batch=rows_per_batch, row_length=row_length, micro_batches=micro_batches
        )
        _check_divisible("rows_per_batch", rows_per_batch, micro_batches)
        check_sequences(sequences, row_length)
        self._sequences = list(sequences)
        self._lengths = [len(sequence) for sequence in self._sequences]
        self.rows_per_batch = rows_per_batch
        self.row_length = row_length
        self.seed = seed
        self.micro_batches = micro_batches
        self._epochs: list[Plan] = []
        self._epoch_starts = [0]  # first row of each epoch in the stream of rows

    def rows_in_epoch(self, epoch: int) -> int:
        """Number of rows that hold the whole data set in this epoch's packing."""
        self._extend(lambda: len(self._epochs) > epoch)
        return len(self._epochs[epoch])

    def steps_per_epoch(self) -> float:
        """Steps that one pass over the data takes (the first epoch's packing)."""
        return self.rows_in_epoch(0) / self.rows_per_batch

    def fill_rate(self) -> float:
        """Share of tokens that are not padding in the first epoch, in (0, 1]."""
        return sum(self._lengths) / (self.rows_in_epoch(0) * self.row_length)

    def batch(self, step: int) -> LoadedBatch:
        """The batch of step `step` (from 0): arrays [rows_per_batch, row_length].

        Sequence ids inside the batch count its sequences from 0; `ids[sequence_id]` is the index in
        the data set.
        """
        _check_step(step)
        first = step * self.rows_per_batch
        last = first + self.rows_per_batch
        self._extend(lambda: self._epoch_starts[-1] >= last)
        members: list[list[tuple[int, int]]] = []
        ids: list[int] = []
        epoch = bisect.bisect_right(self._epoch_starts, first) - 1
        for place in range(first, last):
            if place >= self._epoch_starts[epoch + 1]:
                epoch += 1
            row = self._epochs[epoch][place - self._epoch_starts[epoch]]
            members.append([(index, len(ids) + offset) for offset, index in enumerate(row)])
            ids.extend(row)
        batch = fill_rows(
            self._sequences, members, num_rows=self.rows_per_batch, row_length=self.row_length
        )
        if self.micro_batches > 1:
            batch = _split_leading(batch, self.micro_batches)
        return LoadedBatch(batch=batch, extras={}, ids=np.asarray(ids, np.int64))

    def _extend(self, enough) -> None:
        while not enough():
            rng = np.random.default_rng([self.seed, len(self._epochs)])
            order = rng.permutation(len(self._sequences)).tolist()
            rows = plan_rows((self._lengths[index] for index in order), self.row_length)
            plan = [[order[place] for place in rows[row]] for row in rng.permutation(len(rows))]
            self._epochs.append(plan)
            self._epoch_starts.append(self._epoch_starts[-1] + len(plan))


class PreferenceLoader:
    """Batches of pairs: every epoch is all pairs, once, in an order of its own; epochs run into
    each other.

    Each (micro-)batch holds P pairs exactly, packed longest first; its row count is the smallest
    that fits every batch of the schedule, so one shape is compiled. Sequence ids 0 … P−1 are the
    chosen sides, P … 2P−1 the rejected ones.
    """

    def __init__(
        self,
        pairs: SequenceOf[PairSequences],
        *,
        pairs_per_batch: int,
        row_length: int,
        seed: int,
        total_steps: int,
        extras: Mapping[str, np.ndarray] | None = None,
        micro_batches: int = 1,
        rows_multiple: int = 1,
    ):
        _check_positive(
            pairs_per_batch=pairs_per_batch,
            row_length=row_length,
            total_steps=total_steps,
            micro_batches=micro_batches,
            rows_multiple=rows_multiple,
        )
        _check_divisible("pairs_per_batch", pairs_per_batch, micro_batches)
        check_sequences([pair.chosen for pair in pairs], row_length, name="chosen sequences")
        check_sequences([pair.rejected for pair in pairs], row_length, name="rejected sequences")
        self._pairs = list(pairs)
        self._extras = {name: np.asarray(values) for name, values in (extras or {}).items()}
        for name, values in self._extras.items():
            if values.shape[:1] != (len(self._pairs),):
                raise ValueError(
                    f"extras[{name!r}] must have one entry per pair, {len(self._pairs)}; "
                    f"its shape is {list(values.shape)}."
                )
        self.pairs_per_batch = pairs_per_batch
        self.row_length = row_length
        self.seed = seed
        self.total_steps = total_steps
        self.micro_batches = micro_batches
        self._orders: list[np.ndarray] = []
        self._plans = [
            [self._plan(ids) for ids in np.split(self._pair_ids(step), micro_batches)]
            for step in range(total_steps)
        ]
        needed = max(len(plan) for plans in self._plans for plan in plans)
        self.num_rows = -(-needed // rows_multiple) * rows_multiple  # rows of one micro-batch

    def steps_per_epoch(self) -> float:
        """Steps that one pass over the pairs takes."""
        return len(self._pairs) / self.pairs_per_batch

    def fill_rate(self) -> float:
        """Share of tokens that are not padding over the whole schedule, in (0, 1]."""
        used = sum(
            len(self._pairs[index].chosen) + len(self._pairs[index].rejected)
            for step in range(self.total_steps)
            for index in self._pair_ids(step)
        )
        return used / (self.total_steps * self.micro_batches * self.num_rows * self.row_length)

    def batch(self, step: int) -> LoadedBatch:
        """The batch of step `step`, 0 … total_steps − 1: arrays [num_rows, row_length]; ids are
        pair indices.

        Raises:
          IndexError: outside the schedule that the row count was computed for.
        """
        _check_step(step)
        if step >= self.total_steps:
            raise IndexError(
                f"step {step} is outside the schedule of {self.total_steps} steps that this "
                "loader was made for."
            )
        ids = self._pair_ids(step)
        parts = []
        for part_ids, plan in zip(
            np.split(ids, self.micro_batches), self._plans[step], strict=True
        ):
            sides = self._sides(part_ids)
            members = [[(index, index) for index in row] for row in plan]
            parts.append(
                fill_rows(sides, members, num_rows=self.num_rows, row_length=self.row_length)
            )
        extras = {name: values[ids] for name, values in self._extras.items()}
        if self.micro_batches == 1:
            return LoadedBatch(batch=parts[0], extras=extras, ids=ids)
        stacked = PackedBatch(
            **{
                field.name: np.stack([getattr(part, field.name) for part in parts])
                for field in dataclasses.fields(PackedBatch)
            }
        )
        extras = {
            name: values.reshape(self.micro_batches, -1, *values.shape[1:])
            for name, values in extras.items()
        }
        return LoadedBatch(batch=stacked, extras=extras, ids=ids)

    def _pair_ids(self, step: int) -> np.ndarray:
        """int64 [pairs_per_batch]: the next pairs in the stream of all epochs' orders."""
        size = len(self._pairs)
        places = np.arange(step * self.pairs_per_batch, (step + 1) * self.pairs_per_batch)
        while len(self._orders) * size <= places[-1]:
            rng = np.random.default_rng([self.seed, len(self._orders)])
            self._orders.append(rng.permutation(size))
        return np.asarray([self._orders[place // size][place % size] for place in places], np.int64)

    def _sides(self, ids: np.ndarray) -> list[Sequence]:
        pairs = [self._pairs[index] for index in ids]
        return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]

    def _plan(self, ids: np.ndarray) -> Plan:
        return plan_rows_decreasing([len(side) for side in self._sides(ids)], self.row_length)


def sft_batches(
    sequences: SequenceOf[Sequence],
    *,
    rows_per_batch: int,
    row_length: int,
    seed: int,
    micro_batches: int = 1,
) -> SequenceLoader:
    """A loader of packed sequences.

    Args:
      sequences: the data set; none longer than a row, none without weight.
      rows_per_batch: S, rows of every batch.
      row_length: L, tokens of a row.
      seed: the order of the data is a function of it and of the step alone.
      micro_batches: K, a divisor of rows_per_batch; above 1 the arrays are [K, S/K, L].

    Returns:
      A loader whose `batch(step)` works at any step, in any order.

    Raises:
      ValueError: on an empty data set, a sequence that does not fit or has no weight, or impossible
        sizes.
    """
    return SequenceLoader(
        sequences,
        rows_per_batch=rows_per_batch,
        row_length=row_length,
        seed=seed,
        micro_batches=micro_batches,
    )


def preference_batches(
    pairs: SequenceOf[PairSequences],
    *,
    pairs_per_batch: int,
    row_length: int,
    seed: int,
    total_steps: int,
    extras: Mapping[str, np.ndarray] | None = None,
    micro_batches: int = 1,
    rows_multiple: int = 1,
) -> PreferenceLoader:
    """A loader of packed preference pairs.

    Args:
      pairs: the data set; a pair's index is its place here.
      pairs_per_batch: P, pairs of every batch.
      row_length: L, tokens of a row.
      seed: the order of the pairs is a function of it and of the step alone.
      total_steps: the schedule; the row count is the smallest that fits each of its batches.
      extras: per-pair arrays (leading axis: all pairs), such as the reference's log-probabilities
        `ref_chosen_logps` and `ref_rejected_logps`; each batch carries its own pairs' entries.
      micro_batches: K, a divisor of pairs_per_batch; above 1 the arrays are [K, S, L], each
        micro-batch with its own P/K pairs and sequence ids.
      rows_multiple: rows are rounded up to a multiple of this (the devices they are split over).

    Returns:
      A loader whose `batch(step)` works at any step of the schedule, in any order.

    Raises:
      ValueError: on an empty data set, a sequence that does not fit or has no weight, extras of
        another length, or impossible sizes.
    """
    return PreferenceLoader(
        pairs,
        pairs_per_batch=pairs_per_batch,
        row_length=row_length,
        seed=seed,
        total_steps=total_steps,
        extras=extras,
        micro_batches=micro_batches,
        rows_multiple=rows_multiple,
    )


def _split_leading(batch: PackedBatch, parts: int) -> PackedBatch:
    return PackedBatch(
        **{
            field.name: (array := getattr(batch, field.name)).reshape(parts, -1, array.shape[-1])
            for field in dataclasses.fields(PackedBatch)
        }
    )


def _check_step(step: int) -> None:
    if step < 0:
        raise IndexError(f"step must not be negative; got {step}.")


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")


def _check_divisible(name: str, size: int, micro_batches: int) -> None:
    if size % micro_batches:
        raise ValueError(f"{name} = {size} does not divide into micro_batches = {micro_batches}.")
