"""Targets as other trainers' data: those of a run, or made here of any file of episodes."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from w2sjax.config import PREFERENCE_METHODS, SFT_METHODS
from w2sjax.pipeline import forest as forests
from w2sjax.pipeline.blocks import EPISODES
from w2sjax.pipeline.manifests import MANIFEST
from w2sjax.pipeline.storage import load_arrays, whole_file, write_json
from w2sjax.sampling import dump_trajectories, read_trajectories
from w2sjax.sampling.exchange import (
    ContextsDifferError,
    ImportOptions,
    ImportReport,
    episode_record,
    import_records,
    preference_record,
    read_records,
    sft_record,
)
from w2sjax.types import Trajectory

PAIRS = {name: "dpo" if name == "dpo" else "tree_dpo" for name in PREFERENCE_METHODS}  # → target
_RUN = "config.json"


def import_files(
    sources: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: ImportOptions,
    *,
    strict: bool = False,
) -> ImportReport:
    """Writes other people's trajectories as a file of ours, and `<out>.report.json` beside it.

    Args:
      sources: files and folders of records.
      out: the file, which appears whole.
      options: how records are read.
      strict: a refused record is an error.

    Raises:
      FileNotFoundError: a source that is not there.
      ValueError: nothing could be converted, or `strict` and not all.
    """
    report = ImportReport()
    listed = f"{os.fspath(out)}.report.json"
    with whole_file(out) as file:
        for source in sources:
            for trajectory in import_records(read_records(source), options, report):
                file.write(dump_trajectories([trajectory]))
        write_json(listed, {"options": dataclasses.asdict(options)} | report.facts())
        if not report.imported or (strict and report.refused):
            first = "".join(f"\n  {refusal}" for refusal in report.refused[:5])
            raise ValueError(
                f"{len(report.refused)} of {report.records} records were refused, and no file was "
                f"written (all are listed in {listed}):{first}"
            )
    return report


def read_source(source: str | os.PathLike[str], stage: str = "rollouts") -> list[Trajectory]:
    """The episodes of a file, a stage's directory, or a stage of a run.

    Raises:
      FileNotFoundError: no such file, or a stage that is not finished.
      TrajectoryFileError: a damaged file.
    """
    path = epath.Path(source)
    if is_run(path):
        path = _finished(path, stage)
    return read_trajectories(path / EPISODES if path.is_dir() else path)


def find_target(
    source: str | os.PathLike[str], method: str, config: ml_collections.ConfigDict
) -> tuple[list[Trajectory], dict[str, np.ndarray]]:
    """The episodes and the arrays (see `forest.make_targets`) that a method is trained on.

    Args:
      source: a run, whose own targets are taken; or episodes, whose trees, search and targets are
        made now.
      method: a name of `config.METHODS` that trains.
      config: its trees, search, targets and seed are used where targets are made now.

    Raises:
      FileNotFoundError: the run has not got there.
      ValueError: no method that trains, or targets that do not go with the episodes.
    """
    if method not in (*SFT_METHODS, *PAIRS):
        known = ", ".join((*SFT_METHODS, *PAIRS))
        raise ValueError(f"target: got {method!r}; known: {known}")
    path = epath.Path(source)
    if method == "ceiling":
        episodes = read_source(path, "expert_episodes")
        longest = max((len(episode.steps) for episode in episodes), default=0)
        return episodes, {"step_weights": np.ones((len(episodes), longest), np.float32)}
    episodes = read_source(path)
    target = PAIRS.get(method, method)
    if is_run(path):
        arrays = load_arrays(_finished(path, "targets") / f"{target}.npz")
        indexed = [*arrays.get("chosen", ()), *arrays.get("rejected", ())]
        rows = len(arrays["step_weights"]) if "step_weights" in arrays else len(episodes)
        if rows != len(episodes) or max(indexed, default=-1) >= len(episodes):
            raise ValueError(
                f"{path}: the target {target} is not of its {len(episodes)} rollouts; they were "
                "changed after the run"
            )
        return episodes, arrays
    forest = forests.build_forest(episodes, merge_on=config.trees.merge_on)
    values = forests.search_forest(forest, **config.search)
    return episodes, forests.make_targets(forest, values, config.targets, seed=config.seed)[target][
        0
    ]


def episode_records(
    episodes: Sequence[Trajectory], counts: collections.Counter[str], *, system: str
) -> Iterator[dict[str, Any]]:
    """Whole episodes as records; those that broke are left out and counted."""
    for episode in episodes:
        if not episode.status.scored:
            counts[f"left out: {episode.status}"] += 1
            continue
        yield episode_record(episode, system=system)


def target_records(
    episodes: Sequence[Trajectory],
    arrays: Mapping[str, np.ndarray],
    counts: collections.Counter[str],
    *,
    system: str,
    context: str,
) -> Iterator[dict[str, Any]]:
    """What a target learns, as records: weighted episodes, or pairs.

    Args:
      episodes: what the arrays point into.
      arrays: of one target, from `find_target`.
      counts: what is left out, and what a reader of the records should know, is counted here.
      system, context: see `sampling.exchange.preference_record`.
    """
    if "step_weights" in arrays:
        for episode, weights in zip(episodes, arrays["step_weights"], strict=True):
            record = None
            if episode.status.scored:
                record = sft_record(episode, weights.tolist(), system=system)
            if record is None:
                counts["left out: episodes that the target does not learn"] += 1
                continue
            if len(set(record["step_weights"])) > 1:
                counts["answers of unequal weight (step_weights); not every trainer heeds it"] += 1
            yield record
        return
    for row in range(len(arrays["chosen"])):
        at = {key: int(arrays[key][row]) for key in ("start", "chosen_end", "rejected_end")}
        sides = [episodes[int(arrays[name][row])] for name in ("chosen", "rejected")]
        gap = float(arrays["value_gap"][row])
        try:
            yield preference_record(*sides, **at, value_gap=gap, system=system, context=context)
        except ContextsDifferError:
            counts["left out: sides whose texts differ before they part (--context=chosen)"] += 1


def write_records(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records as JSON Lines, whole, and returns how many there are."""
    count = 0
    with whole_file(path) as file:
        for record in records:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
            try:
                line = text.encode()
            except UnicodeEncodeError:  # half a surrogate pair: only escapes can hold it
                line = json.dumps(record).encode()
            file.write(line + b"\n")
            count += 1
        if not count:
            raise ValueError(f"{os.fspath(path)}: there is nothing to write")
    return count


def is_run(source: str | os.PathLike[str]) -> bool:
    """Whether a path is the workdir of a run."""
    return (epath.Path(source) / _RUN).exists()


def _finished(run: epath.Path, stage: str) -> epath.Path:
    if not (run / stage / MANIFEST).exists():
        raise FileNotFoundError(f"{run} has no finished stage {stage!r} (no {stage}/{MANIFEST})")
    return run / stage
