"""What a train step sees at step t: a function of (seed, t) alone, at one of few static shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Literal, NamedTuple, Protocol

import numpy as np

from w2sjax.batches.packing import Part, Prefixes, Sequence, fill_rows, find_prefixes, plan_rows
from w2sjax.types import PackedBatch

# "tree": sequences of a batch share their prefixes; "none": each has a row of its own, as plain
# trainers do it, for comparison and debugging.
Packing = Literal["tree", "none"]
PACKINGS = ("tree", "none")


class LoadedBatch(NamedTuple):
    """One step's input.

    With `micro_batches` = K > 1 every array has a leading axis K.
    """

    batch: PackedBatch  # numpy arrays [S, L] or [K, S, L]
    extras: dict[str, np.ndarray]  # per-pair arrays [P] or [K, P/K]; empty for sequences
    ids: np.ndarray  # int64, what the batch is made of: indices into the data set


class Loader(Protocol):
    """What `train.fit` asks of a loader."""

    def batch(self, step: int) -> LoadedBatch:
        """The batch of step `step` (from 0)."""
        ...


@dataclasses.dataclass(frozen=True)
class PairSequences:
    """Two answers to one context: tokens shared by both come first."""

    chosen: Sequence
    rejected: Sequence

    @functools.cached_property
    def parting(self) -> int:
        """How many first tokens both sides have in common, with equal weights."""
        shorter = min(len(self.chosen), len(self.rejected))
        differs = self.chosen.tokens[:shorter] != self.rejected.tokens[:shorter]
        differs |= self.chosen.weights[:shorter] != self.rejected.weights[:shorter]
        first = int(differs.argmax())
        return first if differs[first] else shorter


def pair_parts(pairs: SequenceOf[PairSequences]) -> tuple[list[Sequence], list[Part]]:
    """What a preference loss needs of P pairs.

    Returns:
      2P sequences, the chosen ones first, and 3P parts: of each chosen side what follows the
      parting, of each rejected side likewise, and of each pair what both share.
    """
    count = len(pairs)
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    own = [
        Part(place, pairs[place % count].parting, len(sequence))
        for place, sequence in enumerate(sequences)
    ]
    return sequences, own + [Part(place, 0, pair.parting) for place, pair in enumerate(pairs)]


class _Layout(NamedTuple):
    """A micro-batch, laid into rows but not yet written."""

    sequences: SequenceOf[Sequence]
    parts: SequenceOf[Part]
    prefixes: Prefixes
    rows: list[list[int]]
    row_length: int  # the shortest that will do
    num_entries: int  # path entries of the fullest row


class BatchLoader:
    """Batches of so many items each; every epoch is all items, once, in an order of its own, and
    epochs run into each other.

    Items of one group (the trajectories of a task) follow each other, so that they meet in a batch
    and share what they have in common. Row lengths of the whole schedule are gathered into few
    shapes that pad as little as possible.

    `sft_batches` and `preference_batches` make them.
    """

    def __init__(
        self,
        items: SequenceOf,
        take: Callable[[SequenceOf], tuple[SequenceOf[Sequence], SequenceOf[Part]]],
        *,
        per_batch: int,
        total_steps: int,
        seed: int,
        groups: SequenceOf[int] | None,
        extras: Mapping[str, np.ndarray],
        micro_batches: int,
        num_rows: int,
        packing: Packing,
        num_shapes: int,
        round_to: int,
    ):
        for name, size in (
            ("total_steps", total_steps),
            ("micro_batches", micro_batches),
            ("num_rows", num_rows),
            ("num_shapes", num_shapes),
            ("round_to", round_to),
        ):
            _check_positive(name, size)
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}; got {packing!r}.")
        for name, values in extras.items():
            if values.shape[:1] != (len(items),):
                raise ValueError(
                    f"extras[{name!r}] must have one entry per pair, {len(items)}; "
                    f"its shape is {list(values.shape)}."
                )
        groups = np.arange(len(items)) if groups is None else np.asarray(groups)
        if groups.shape != (len(items),):
            raise ValueError(
                f"groups must have one entry per item, {len(items)}; "
                f"its shape is {list(groups.shape)}."
            )
        self._items, self._take, self._extras = list(items), take, dict(extras)
        self._members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self._orders: list[np.ndarray] = []
        self._per_batch, self.total_steps, self.seed = per_batch, total_steps, seed
        self._micro_batches, self._num_rows, self.packing = micro_batches, num_rows, packing
        self._real = self._laid_out = 0  # tokens of all sequences, and of their tries
        needs = [self._need(step) for step in range(total_steps)]
        needs = [(_round_up(length, round_to), entries) for length, entries in needs]
        ends = choose_lengths([length for length, _ in needs], num_shapes)
        # Row length → path entries; one compiled program each.
        self.shapes = {
            end: _round_up(max(entries for length, entries in needs if length <= end), round_to)
            for end in ends
        }
        self._lengths = [next(end for end in ends if length <= end) for length, _ in needs]

    def steps_per_epoch(self) -> float:
        """Steps that one pass over the items takes."""
        return len(self._items) / self._per_batch

    def fill_rate(self) -> float:
        """Share of tokens that are not padding over the whole schedule, in (0, 1]."""
        return self._laid_out / (self._rows() * self._micro_batches * sum(self._lengths))

    def sharing(self) -> float:
        """Tokens of all sequences over tokens that are laid out, padding aside, at least 1: what
        packing saves at best.
        """
        return self._real / self._laid_out

    def batch(self, step: int) -> LoadedBatch:
        """The batch of step `step`, 0 … total_steps − 1; `ids` are indices of items.

        Raises:
          IndexError: outside the schedule that the shapes were chosen for.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(
                f"step {step} is outside the schedule of {self.total_steps} steps that this "
                "loader was made for."
            )
        ids = self._ids(step)
        length = self._lengths[step]
        made = []
        for layout in self._layouts(ids):
            made.append(
                fill_rows(
                    layout.sequences,
                    layout.prefixes,
                    layout.rows,
                    num_rows=self._rows(),
                    row_length=length,
                    parts=layout.parts,
                    num_entries=self.shapes[length],
                )
            )
        extras = {name: values[ids] for name, values in self._extras.items()}
        if self._micro_batches == 1:
            return LoadedBatch(batch=made[0], extras=extras, ids=ids)
        fields = {
            field.name: np.stack([getattr(part, field.name) for part in made])
            for field in dataclasses.fields(PackedBatch)
        }
        extras = {
            name: values.reshape(self._micro_batches, -1, *values.shape[1:])
            for name, values in extras.items()
        }
        return LoadedBatch(batch=PackedBatch(**fields), extras=extras, ids=ids)

    def _ids(self, step: int) -> np.ndarray:
        """int64 [per_batch]: the next items in the stream of all epochs' orders."""
        size = len(self._items)
        places = np.arange(step * self._per_batch, (step + 1) * self._per_batch)
        while len(self._orders) * size <= places[-1]:
            rng = np.random.default_rng([self.seed, len(self._orders)])
            groups = rng.permutation(len(self._members))
            self._orders.append(np.concatenate([rng.permutation(self._members[g]) for g in groups]))
        return np.asarray([self._orders[place // size][place % size] for place in places], np.int64)

    def _rows(self) -> int:
        """S: rows of a micro-batch."""
        if self.packing == "tree":
            return self._num_rows
        sequences, _ = self._take([self._items[0]])
        needed = len(sequences) * self._per_batch // self._micro_batches
        return -(-needed // self._num_rows) * self._num_rows

    def _layouts(self, ids: np.ndarray) -> Iterator[_Layout]:
        for part in np.split(ids, self._micro_batches):
            sequences, parts = self._take([self._items[index] for index in part])
            share = self.packing == "tree"
            prefixes = find_prefixes(sequences, share=share)
            if share:
                rows, row_length = shortest_rows(prefixes, self._num_rows)
            else:
                rows = [[place] for place in range(len(sequences))]
                row_length = round_length(int(prefixes.lengths.max()))
            entries = np.zeros(len(sequences), np.int64)
            for one in parts:
                first, last = np.searchsorted(sequences[one.sequence].learned, one[1:])
                entries[one.sequence] += last - first
            num_entries = max(int(entries[prefixes.order[places]].sum()) for places in rows)
            yield _Layout(sequences, parts, prefixes, rows, row_length, num_entries)

    def _need(self, step: int) -> tuple[int, int]:
        """Row length and path entries that a step's micro-batches need."""
        length = entries = 0
        for layout in self._layouts(self._ids(step)):
            length, entries = max(length, layout.row_length), max(entries, layout.num_entries)
            self._real += int(layout.prefixes.lengths.sum())
            self._laid_out += layout.prefixes.num_tokens
        return length, entries


def round_length(tokens: int) -> int:
    """A row length that fits so many tokens: a multiple of 64, above 512 of 128."""
    return _round_up(tokens, 64 if tokens <= 512 else 128)


def shortest_rows(prefixes: Prefixes, num_rows: int) -> tuple[list[list[int]], int]:
    """Lays a trie into at most so many rows, as short as may be.

    Args:
      prefixes: the trie.
      num_rows: S.

    Returns:
      (rows as from `plan_rows`, their length, a `round_length`).
    """
    least = max(int(prefixes.lengths.max()), -(-prefixes.num_tokens // num_rows))
    row_length = round_length(least)
    while len(rows := plan_rows(prefixes, row_length)) > num_rows:
        row_length = round_length(row_length + 1)
    return rows, row_length


def choose_lengths(needed: SequenceOf[int], num_shapes: int) -> list[int]:
    """Few lengths that many are padded to, with the least padding in all.

    Args:
      needed: at least one length.
      num_shapes: how many may be chosen.

    Returns:
      Increasing, the longest last.

    Example:
      >>> choose_lengths([64, 64, 64, 128, 512], 2)
      [128, 512]
    """
    lengths, counts = np.unique(np.asarray(needed), return_counts=True)
    total = np.cumsum(counts)
    # best[i]: (tokens, chosen) of the lengths up to number i, of which number i is one.
    best = [(total[i] * lengths[i], [int(lengths[i])]) for i in range(len(lengths))]
    for _ in range(num_shapes - 1):
        longer = []
        for i, (least, chosen) in enumerate(best):
            for j in range(i):
                tokens = best[j][0] + (total[i] - total[j]) * lengths[i]
                if tokens < least:
                    least, chosen = tokens, [*best[j][1], int(lengths[i])]
            longer.append((least, chosen))
        best = longer
    return best[-1][1]


def sft_batches(
    sequences: SequenceOf[Sequence],
    *,
    sequences_per_batch: int,
    total_steps: int,
    seed: int,
    max_length: int | None = None,
    groups: SequenceOf[int] | None = None,
    micro_batches: int = 1,
    num_rows: int = 1,
    packing: Packing = "tree",
    num_shapes: int = 3,
    round_to: int = 64,
) -> BatchLoader:
    """A loader of sequences, for losses over single tokens.

    Args:
      sequences: the data set; none without weight.
      sequences_per_batch: sequences of every batch.
      total_steps: the schedule, whose batches the shapes are chosen for.
      seed: the order of the data is a function of it and of the step alone.
      max_length: no sequence may be longer; no limit where None.
      groups: int, for each sequence: those of one number come in a batch together as far as they
        fit. By default each is on its own.
      micro_batches: K, a divisor of sequences_per_batch; above 1 the arrays are [K, S, L].
      num_rows: S, rows of a micro-batch: the number of devices they are split over, or a multiple.
        With packing "none", S is the number of sequences rounded up to a multiple of it.
      packing: see `Packing`.
      num_shapes: how many row lengths may be used, each a program to compile.
      round_to: row lengths and path entries are rounded up to multiples of it: trainings whose data
        differ share programs more often, and pad more.

    Returns:
      A loader whose `batch(step)` works at any step of the schedule, in any order.

    Raises:
      ValueError: on an empty data set, a sequence that is too long or has no weight, or impossible
        sizes.
    """
    _check_sequences(sequences, max_length, "sequences")
    _check_positive("sequences_per_batch", sequences_per_batch)
    _check_divisible("sequences_per_batch", sequences_per_batch, micro_batches)
    return BatchLoader(
        sequences,
        lambda items: (items, ()),
        per_batch=sequences_per_batch,
        total_steps=total_steps,
        seed=seed,
        groups=groups,
        extras={},
        micro_batches=micro_batches,
        num_rows=num_rows,
        packing=packing,
        num_shapes=num_shapes,
        round_to=round_to,
    )


def preference_batches(
    pairs: SequenceOf[PairSequences],
    *,
    pairs_per_batch: int,
    total_steps: int,
    seed: int,
    max_length: int | None = None,
    groups: SequenceOf[int] | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
    micro_batches: int = 1,
    num_rows: int = 1,
    packing: Packing = "tree",
    num_shapes: int = 3,
    round_to: int = 64,
) -> BatchLoader:
    """A loader of preference pairs. The paths of a (micro-)batch of P pairs are those of
    `pair_parts`: 0 … P−1 the chosen sides after the parting, P … 2P−1 the rejected ones, 2P … 3P−1
    what both share.

    Args:
      pairs: the data set; a pair's index is its place here.
      pairs_per_batch: pairs of every batch.
      total_steps, seed, max_length, groups, packing, num_rows, num_shapes, round_to: as in
        `sft_batches`.
      extras: per-pair arrays (leading axis: all pairs), such as the reference's log-probabilities;
        each batch carries its own pairs' entries, and `path_tokens` int32 [P, 3], how many learned
        tokens each pair's three paths have.
      micro_batches: K, a divisor of pairs_per_batch; each has its own P/K pairs and paths.

    Returns:
      A loader whose `batch(step)` works at any step of the schedule, in any order.

    Raises:
      ValueError: on an empty data set, a sequence that is too long or has no weight, extras of
        another length, or impossible sizes.
    """
    _check_sequences([pair.chosen for pair in pairs], max_length, "chosen sequences")
    _check_sequences([pair.rejected for pair in pairs], max_length, "rejected sequences")
    _check_positive("pairs_per_batch", pairs_per_batch)
    _check_divisible("pairs_per_batch", pairs_per_batch, micro_batches)
    arrays = {name: np.asarray(values) for name, values in (extras or {}).items()}
    arrays["path_tokens"] = np.array([_path_tokens(pair) for pair in pairs], np.int32)
    return BatchLoader(
        pairs,
        pair_parts,
        per_batch=pairs_per_batch,
        total_steps=total_steps,
        seed=seed,
        groups=groups,
        extras=arrays,
        micro_batches=micro_batches,
        num_rows=num_rows,
        packing=packing,
        num_shapes=num_shapes,
        round_to=round_to,
    )


def _path_tokens(pair: PairSequences) -> tuple[int, int, int]:
    shared = int(np.searchsorted(pair.chosen.learned, pair.parting))
    return len(pair.chosen.learned) - shared, len(pair.rejected.learned) - shared, shared


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _check_sequences(sequences: SequenceOf[Sequence], max_length: int | None, name: str) -> None:
    """Raises ValueError, naming the index, where a data set cannot be trained on."""
    if len(sequences) == 0:
        raise ValueError(f"{name} is empty: there is nothing to batch.")
    for index, sequence in enumerate(sequences):
        if max_length is not None and len(sequence) > max_length:
            raise ValueError(
                f"{name}[{index}] has {len(sequence)} tokens, more than max_length = {max_length}: "
                "leave it out and count it."
            )
        if not len(sequence.learned):
            raise ValueError(
                f"{name}[{index}] has weight 0 on every token and would teach nothing: "
                "leave it out."
            )


def _check_positive(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name} must be at least 1; got {size}.")


def _check_divisible(name: str, size: int, micro_batches: int) -> None:
    _check_positive("micro_batches", micro_batches)
    if size % micro_batches:
        raise ValueError(f"{name} = {size} does not divide into micro_batches = {micro_batches}.")
