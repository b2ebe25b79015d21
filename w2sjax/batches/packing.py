"""Sequences into rows of token tries: what they share is laid out, and later computed, once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from w2sjax.types import PackedBatch


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

    @functools.cached_property
    def learned(self) -> np.ndarray:
        """int [≤ L], increasing: the tokens whose weight is not 0."""
        return np.flatnonzero(self.weights)

    @functools.cached_property
    def sort_key(self) -> bytes:
        """Orders sequences like their tokens, so that those of one prefix are neighbours."""
        return self.tokens.astype(">i4").tobytes()


class Part(NamedTuple):
    """A stretch of a sequence whose learned tokens make a path."""

    sequence: int  # index among the packed sequences
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Sequences in the order of their trie, depth first; made by `find_prefixes`.

    Attributes:
      order: int [Q], indices of the sequences.
      lengths: int [Q], tokens of each, in this order.
      common: int [Q], tokens that each shares with the one before it; 0 for the first.
    """

    order: np.ndarray
    lengths: np.ndarray
    common: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole trie."""
        return int(self.lengths.sum() - self.common.sum())


def find_prefixes(sequences: SequenceOf[Sequence], *, share: bool = True) -> Prefixes:
    """Sorts sequences, and finds what neighbours share.

    Args:
      sequences: Q of them.
      share: whether prefixes are looked for at all; without, all have nothing in common.

    Returns:
      `Prefixes`.
    """
    if not share:
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        return Prefixes(np.arange(len(lengths)), lengths, np.zeros(len(lengths), np.int64))
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].sort_key)
    lengths = np.array([len(sequences[index]) for index in order], np.int64)
    common = np.zeros(len(order), np.int64)
    for place, (left, right) in enumerate(itertools.pairwise(order), start=1):
        shorter = min(lengths[place - 1], lengths[place])
        differs = sequences[left].tokens[:shorter] != sequences[right].tokens[:shorter]
        first = differs.argmax()
        common[place] = first if differs[first] else shorter
    return Prefixes(np.array(order, np.int64), lengths, common)


def best_fit(sizes: Iterable[int], capacity: int) -> list[list[int]]:
    """Lays things into bins, one after the other, each into the fullest bin that has room.

    O(n · capacity / 64) through one bit mask of the free sizes at hand. Give decreasing sizes for
    the tightest bins.

    Args:
      sizes: each 1 … capacity.
      capacity: of a bin.

    Returns:
      The bins in the order in which they were opened; things are named by their place in `sizes`.

    Example:
      >>> best_fit([6, 8, 2, 4], 10)
      [[0, 3], [1, 2]]
    """
    bins: list[list[int]] = []
    bins_with_free: dict[int, list[int]] = {}  # free size → bins that have exactly so much left
    free_sizes = 0  # bit f set: bins_with_free[f] is not empty
    for index, size in enumerate(sizes):
        fitting = free_sizes >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            candidates = bins_with_free[free]
            place = candidates.pop()
            if not candidates:
                free_sizes &= ~(1 << free)
        else:
            free, place = capacity, len(bins)
            bins.append([])
        bins[place].append(index)
        left = free - size
        if left:
            bins_with_free.setdefault(left, []).append(place)
            free_sizes |= 1 << left
    return bins


def plan_rows(prefixes: Prefixes, row_length: int) -> list[list[int]]:
    """Splits a trie into rows, repeating as little of its trunks as it has to.

    A subtree that fits into a row stays whole. One that does not is split at its first branching;
    its parts are put together by best fit, decreasing, each bin holding the trunk once. A sequence
    lies in one row as a whole, so each row counts its own sequences' losses and nothing is counted
    twice.

    Args:
      prefixes: the trie.
      row_length: L, at least the longest sequence.

    Returns:
      For each row its sequences, as increasing places in `prefixes.order`.

    Raises:
      ValueError: if a sequence is longer than a row.
    """
    lengths, common = prefixes.lengths, prefixes.common
    if len(lengths) == 0:
        return []
    if lengths.max() > row_length:
        index = prefixes.order[lengths.argmax()]
        raise ValueError(
            f"sequence {index} has {lengths.max()} tokens; a row holds 1 to {row_length}."
        )
    ends = np.cumsum(lengths - common)

    def size(start: int, stop: int) -> int:
        """Tokens of the trie of sequences start … stop − 1."""
        return int(lengths[start] + ends[stop - 1] - ends[start])

    # (start, stop) → (size, places) of what it was split into; each at most a row long.
    pieces: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    stack = [((0, len(lengths)), False)]
    while stack:
        (start, stop), split = stack.pop()
        if (whole := size(start, stop)) <= row_length:
            pieces[start, stop] = [(whole, list(range(start, stop)))]
            continue
        inner = common[start + 1 : stop]
        trunk = int(inner.min())
        bounds = [start, *(np.flatnonzero(inner == trunk) + start + 1).tolist(), stop]
        children = list(itertools.pairwise(bounds))
        if not split:
            stack.append(((start, stop), True))
            stack.extend((child, False) for child in children)
            continue
        found = [piece for child in children for piece in pieces.pop(child)]
        found.sort(key=lambda piece: -piece[0])
        beyond = [max(1, tokens - trunk) for tokens, _ in found]
        pieces[start, stop] = [
            (
                trunk + sum(beyond[index] for index in members),
                sorted(place for index in members for place in found[index][1]),
            )
            for members in best_fit(beyond, row_length - trunk)
        ]
    return [places for _, places in pieces[0, len(lengths)]]


def fill_rows(
    sequences: SequenceOf[Sequence],
    prefixes: Prefixes,
    rows: SequenceOf[SequenceOf[int]],
    *,
    num_rows: int,
    row_length: int,
    parts: SequenceOf[Part] = (),
    num_entries: int | None = None,
) -> PackedBatch:
    """Writes the arrays of a batch.

    Args:
      sequences: Q of them.
      prefixes: of the same, from `find_prefixes`.
      rows: from `plan_rows`.
      num_rows: S, at least len(rows); rows past them are padding.
      row_length: L.
      parts: the batch's paths: path i is part i, without the tokens of weight 0.
      num_entries: E; by default as many as the fullest row needs.

    Returns:
      PackedBatch of numpy arrays.
    """
    shape = (num_rows, row_length)
    tokens, positions, subtree_end, predecessor, loss_count = np.zeros((5, *shape), np.int32)
    loss_weight = np.zeros(shape, np.float32)
    columns = np.arange(row_length, dtype=np.int32)
    parts_of: dict[int, list[tuple[int, Part]]] = {}
    for number, part in enumerate(parts):
        parts_of.setdefault(part.sequence, []).append((number, part))
    entries: list[list[tuple[int, np.ndarray, np.ndarray]]] = [[] for _ in range(num_rows)]
    path = np.zeros(row_length, np.int32)  # where in the row the tokens of this sequence lie
    for row, places in enumerate(rows):
        offset = before = 0
        last = None
        for place in places:
            sequence = sequences[prefixes.order[place]]
            length = len(sequence)
            shared = 0 if last is None else int(prefixes.common[last + 1 : place + 1].min())
            # What the sequence before has beyond the common prefix ends here.
            subtree_end[row, path[shared:before]] = offset
            end = offset + length - shared
            tokens[row, offset:end] = sequence.tokens[shared:]
            positions[row, offset:end] = columns[shared:length]
            path[shared:length] = columns[offset:end]
            first = max(shared, 1)  # nothing comes before a path's first token
            predecessor[row, offset + first - shared : end] = path[first - 1 : length - 1]
            learned = sequence.learned
            loss_weight[row, path[learned]] += sequence.weights[learned]
            loss_count[row, path[learned]] += 1
            for number, part in parts_of.get(int(prefixes.order[place]), ()):
                inside = learned[(learned >= part.start) & (learned < part.stop)]
                entries[row].append((number, path[inside], sequence.weights[inside]))
            offset, before, last = end, length, place
        subtree_end[row, path[:before]] = offset
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        subtree_end=subtree_end,
        predecessor=predecessor,
        loss_weight=loss_weight,
        loss_count=loss_count,
        **_path_arrays(entries, num_entries),
    )


def _path_arrays(entries, num_entries: int | None) -> dict[str, np.ndarray]:
    """`path_token`, `path_id` and `path_weight` of a batch."""
    used = [sum(len(places) for _, places, _ in row) for row in entries]
    if num_entries is None:
        num_entries = max(used, default=0)
    token = np.zeros((len(entries), num_entries), np.int32)
    identity = np.full(token.shape, -1, np.int32)
    weight = np.zeros(token.shape, np.float32)
    for row, found in enumerate(entries):
        start = 0
        for number, places, weights in found:
            span = slice(start, start + len(places))
            token[row, span], identity[row, span], weight[row, span] = places, number, weights
            start = span.stop
    return dict(path_token=token, path_id=identity, path_weight=weight)


def pack_rows(
    sequences: SequenceOf[Sequence],
    row_length: int,
    *,
    num_rows: int | None = None,
    share: bool = True,
    parts: SequenceOf[Part] = (),
) -> PackedBatch:
    """Packs one batch.

    Args:
      sequences: Q sequences.
      row_length: L.
      num_rows: S, rows of the result; by default the number needed, rounded up to a power of two,
        so that few shapes are ever compiled.
      share: whether common prefixes are laid out once; without, sequences lie side by side.
      parts: the batch's paths.

    Returns:
      PackedBatch of numpy arrays.

    Raises:
      ValueError: if a sequence is longer than a row, or `num_rows` are too few.

    Example:
      >>> weights = np.array([0, 1, 1])
      >>> row = [Sequence(np.array(tokens), weights) for tokens in ([7, 1, 2], [7, 1, 3])]
      >>> packed = pack_rows(row, 4)
      >>> packed.tokens.tolist(), packed.subtree_end.tolist(), packed.loss_weight.tolist()
      ([[7, 1, 2, 3]], [[4, 4, 3, 4]], [[0.0, 2.0, 1.0, 1.0]])
    """
    prefixes = find_prefixes(sequences, share=share)
    rows = plan_rows(prefixes, row_length)
    if num_rows is None:
        num_rows = 1 << max(len(rows) - 1, 0).bit_length()
    if len(rows) > num_rows:
        raise ValueError(
            f"these sequences need {len(rows)} rows of {row_length}; num_rows is {num_rows}."
        )
    return fill_rows(
        sequences, prefixes, rows, num_rows=num_rows, row_length=row_length, parts=parts
    )


def fill_rate(batch: PackedBatch) -> float:
    """Share of the batch's tokens that are not padding, in [0, 1]."""
    return float(np.mean(np.asarray(batch.subtree_end) > 0))


def token_nodes(batch: PackedBatch) -> np.ndarray:
    """Which node of its row's trie each token belongs to.

    A node is a run of tokens without a branching inside; its tokens are neighbours in the row.

    Args:
      batch: arrays [S, L] from `fill_rows`.

    Returns:
      int32 [S, L], nodes numbered from 0 in each row, depth first; −1 on padding.

    Example:
      >>> weights = np.array([0, 1, 1])
      >>> row = [Sequence(np.array(tokens), weights) for tokens in ([7, 1, 2], [7, 1, 3])]
      >>> token_nodes(pack_rows(row, 5)).tolist()
      [[0, 0, 1, 2, -1]]
    """
    nodes = np.full(batch.tokens.shape, -1, np.int32)
    for row, ends in enumerate(np.asarray(batch.subtree_end)):
        used = int(np.count_nonzero(ends))
        before = batch.predecessor[row, :used]
        inner = batch.positions[row, :used] > 0
        children = np.bincount(before[inner], minlength=used)
        same = inner & (before == np.arange(used) - 1) & (children[before] == 1)
        nodes[row, :used] = np.cumsum(~same) - 1
    return nodes
