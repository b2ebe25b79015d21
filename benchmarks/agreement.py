"""Do two runs of the main job act alike? Greedy actions of the same policies on the same tasks.

    python benchmarks/agreement.py RUN RUN [--json FILE]

For runs that should differ in rounding alone, such as the same config with and without
`--config.batches.packing=none`. Steps are compared task by task; where one episode is longer, its
further steps count as different.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from w2sjax.sampling import read_trajectories


def agreement(left: Path, right: Path) -> tuple[int, int]:
    """(steps with equal actions, steps) of two files of episodes on the same tasks."""
    others = {episode.task_id: episode for episode in read_trajectories(right)}
    equal = total = 0
    for episode in read_trajectories(left):
        other = others.pop(episode.task_id)
        for one, two in itertools.zip_longest(episode.steps, other.steps):
            equal += one is not None and two is not None and one.answer == two.answer
            total += 1
    if others:
        raise ValueError(f"{right} has {len(others)} tasks that {left} has not")
    return equal, total


def main() -> None:
    """Prints the share of equal steps for each policy that both runs evaluated greedily."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, help="workdirs")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    found, sums = {}, [0, 0]
    for directory in sorted((arguments.runs[0] / "evaluate").glob("*.greedy")):
        files = [run / "evaluate" / directory.name / "episodes.jsonl" for run in arguments.runs]
        if not files[1].exists():
            continue
        equal, total = agreement(*files)
        sums = [sums[0] + equal, sums[1] + total]
        found[directory.name.removesuffix(".greedy")] = equal / total
        print(f"{directory.name:28s} {equal:6d} of {total:6d} steps equal, {equal / total:.2%}")
    found["all"] = sums[0] / max(1, sums[1])
    print(f"all: {found['all']:.2%}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
