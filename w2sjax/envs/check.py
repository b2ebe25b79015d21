"""An environment checked by its own expert: success, speed and memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from w2sjax.envs.base import Env, Outcome, make_env
from w2sjax.envs.players import play
from w2sjax.records import Status

_SHOWN = 5  # failures that the summary names


class _Timed:
    """An environment whose calls are timed."""

    def __init__(self, env: Env):
        self._env = env
        self.seconds: dict[str, list[float]] = {"reset": [], "step": [], "expert_action": []}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def _time(self, name: str, call: Callable, *arguments: str) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def reset(self, task_id: str) -> str:
        return self._time("reset", self._env.reset, task_id)

    def step(self, action: str) -> Outcome:
        return self._time("step", self._env.step, action)

    def expert_action(self) -> str:
        return self._time("expert_action", self._env.expert_action)


def check(
    name: str, options: Mapping[str, Any], *, splits: Sequence[str], tasks: int
) -> dict[str, Any]:
    """Lets the expert play the first tasks of some splits, in this process.

    Args:
      name: what `make_env` takes.
      options: keyword arguments of the environment's class.
      splits: which splits.
      tasks: how many tasks of each; all where a split has fewer.

    Returns:
      Plain data: "success" (share of tasks), "steps_per_second" (steps over the whole time in the
      environment: resets and the expert included), "memory_mb" (the largest memory, so far, of this
      process and all that it started), and "splits": split → its tasks, steps, success, mean score,
      the same speed, medians of single calls in ms, and what failed ("task id: why").

    Raises:
      ValueError: unknown environment, option or split. What the environment raises when it is made.
    """
    result: dict[str, Any] = {"env": name, "options": dict(options)}
    rows: dict[str, dict[str, Any]] = {}
    env = _Timed(make_env(name, **options))
    try:
        for split in splits:
            rows[split], env = _check_split(env, split, tasks, lambda: make_env(name, **options))
    finally:
        env.close()
    total = sum(row["tasks"] for row in rows.values())
    steps = sum(row["steps"] for row in rows.values())
    seconds = sum(row.pop("seconds") for row in rows.values())
    result["tasks"] = total
    result["success"] = sum(row["success"] * row["tasks"] for row in rows.values()) / total
    result["steps_per_second"] = steps / seconds if seconds else 0.0
    result["memory_mb"] = max(row["memory_mb"] or 0 for row in rows.values()) or None
    return result | {"splits": rows}


def _check_split(
    env: _Timed, split: str, tasks: int, remake: Callable[[], Env]
) -> tuple[dict[str, Any], _Timed]:
    """One split's row, and the environment to go on with (another where this one broke)."""
    env.seconds = {name: [] for name in env.seconds}
    seconds = env.seconds
    scores, steps, failures = [], 0, []
    ids = _first_ids(env, split, tasks)
    for task_id in ids:
        try:
            episode = play(env, task_id, random_action_rate=0.0, seed=0)
        except Exception as error:  # a broken episode is a finding, and the others still count
            failures.append(f"{task_id}: {type(error).__name__}: {error}")
            env.close()
            env = _Timed(remake())
            env.seconds = seconds
            continue
        steps += len(episode.actions)
        scores.append(episode.score)
        if episode.status != Status.SUCCESS:
            failures.append(f"{task_id}: {episode.status}, score {episode.score:g}")
    total = sum(map(sum, seconds.values()))
    row = {
        "tasks": len(ids),
        "success": 1 - len(failures) / len(ids),
        "score": sum(scores) / len(ids),
        "steps": steps,
        "steps_per_second": steps / total if total else 0.0,
        **{f"{name}_ms": _median_ms(values) for name, values in seconds.items()},
        "memory_mb": tree_memory_mb(),
        "failures": failures,
        "seconds": total,
    }
    return row, env


def _first_ids(env: Env, split: str, tasks: int) -> Sequence[str]:
    try:
        ids = env.task_ids(split, tasks)
    except ValueError:
        ids = env.task_ids(split)  # unknown, or smaller than that
        if len(ids) >= tasks:
            raise
    if not ids:
        raise ValueError(f"split {split!r} has no tasks")
    return ids


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(1e3 * statistics.median(seconds), 3) if seconds else None


def tree_memory_mb() -> int | None:
    """Peak resident memory of this process and its descendants, in MB, summed.

    Without /proc it is what `ps` says they have now; None where there is neither.
    """
    rows = _from_proc() if Path("/proc/self/status").exists() else _from_ps()
    tree, grown = {os.getpid()}, True
    while grown:
        grown = False
        for pid, parent, _ in rows:
            if parent in tree and pid not in tree:
                tree.add(pid)
                grown = True
    total = sum(memory for pid, _, memory in rows if pid in tree)
    return total // 1024 or None


def _from_proc() -> list[tuple[int, int, int]]:
    """(pid, parent's pid, peak memory in kB) of all processes."""
    rows = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                lines = (folder / "status").read_text(errors="replace").splitlines()
            except OSError:  # it has just ended
                continue
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            memory = fields.get("VmHWM", "0").split()[0]
            rows.append((int(folder.name), int(fields["PPid"]), int(memory)))
    return rows


def _from_ps() -> list[tuple[int, int, int]]:
    """(pid, parent's pid, memory in kB) of all processes."""
    command = ["ps", "-axo", "pid=,ppid=,rss="]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"memory is not known: {error}", file=sys.stderr)
        return []
    return [tuple(map(int, line.split())) for line in out.splitlines()]


def summary(result: Mapping[str, Any]) -> str:
    """What `check` found, as a text for people."""
    lines = ["split      tasks  success  score  steps/s  step ms  reset ms  expert ms  memory MB"]
    for split, row in result["splits"].items():
        times = [row["step_ms"], row["reset_ms"], row["expert_action_ms"]]
        step, reset, expert = ("–" if value is None else f"{value:.2f}" for value in times)
        lines.append(
            f"{split:10} {row['tasks']:5}  {row['success']:7.3f}  {row['score']:5.3f} "
            f"{row['steps_per_second']:8.0f} {step:>8}  {reset:>8}  {expert:>9}  "
            f"{row['memory_mb'] or '–':>9}"
        )
        lines += [f"  failed: {failure}" for failure in row["failures"][:_SHOWN]]
        if len(row["failures"]) > _SHOWN:
            lines.append(f"  and {len(row['failures']) - _SHOWN} more")
    lines.append(
        f"{result['env']}: success {result['success']:.3f} of {result['tasks']} tasks, "
        f"{result['steps_per_second']:.0f} steps/s"
    )
    return "\n".join(lines)
