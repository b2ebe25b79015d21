"""Trajectories on disk: JSON Lines that a person can read, one episode a line.

A line is an object with these fields:

    format         int, version of this layout (1)
    task_id        string
    rollout        int >= 0, index among the rollouts of the task
    env, policy    strings
    seed           int
    messages       list of {"role", "content"}: system, user, then assistant and user for each step
    actions        list, per step a string, or null where the answer was malformed
    rewards        list of numbers, per step
    answer_ids     list, per step a list of token ids, or null
    answer_logps   list, per step a number (nats), or null
    status         string, see `w2sjax.types.Status`
    score          number in [0, 1]
    error          string, what broke; "" where nothing did

and, in an episode that went on from a later point of an earlier one,

    start          int > 0, how many of its steps were replayed
"""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Self

from etils import epath

from w2sjax.types import Status, Step, Trajectory

FORMAT = 1

_FIELDS = (
    "format", "task_id", "rollout", "env", "policy", "seed", "messages", "actions", "rewards",
    "answer_ids", "answer_logps", "status", "score", "error",
)  # fmt: skip


class TrajectoryFileError(ValueError):
    """A trajectory file is not what it should be; the message names file, line and field."""


class TrajectoryWriter:
    """Appends episodes to a file; what `write` has returned from survives the death of the process.

    A line that was torn by such a death (the last one, without its newline) is cut off when the
    file is opened again, so that its episode can be sampled again.

    Attributes:
      path: the file.
      torn_bytes: how many bytes were cut off at opening; 0 where the file was whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens or creates the file.

        Raises:
          OSError: the file cannot be written.
        """
        self.path = pathlib.Path(path)
        self._file = open(self.path, "ab+")  # noqa: SIM115 (closed by close)
        self.torn_bytes = self._cut_torn_tail()

    def _cut_torn_tail(self) -> int:
        size = self._file.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            logging.warning("%s: cut off a torn last line of %d bytes", self.path, size - end)
            self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        return size - end

    def write(self, trajectory: Trajectory) -> None:
        """Appends one episode and hands it to the operating system.

        Raises:
          ValueError: a number that is not finite, or another value that could not be read back.
        """
        self._file.write(_to_line(trajectory))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dump_trajectories(trajectories: Iterable[Trajectory]) -> bytes:
    """The contents of a file of these episodes, for where it is written whole.

    Raises:
      ValueError: a number that is not finite, or another value that could not be read back.
    """
    return b"".join(map(_to_line, trajectories))


def read_trajectories(
    path: str | os.PathLike[str], *, allow_torn_tail: bool = False
) -> list[Trajectory]:
    """Reads all episodes of a file, in its order.

    Args:
      path: what a `TrajectoryWriter` wrote, also in a bucket (`gs://…`).
      allow_torn_tail: drop a last line without newline (its writer died); else that is an error.

    Raises:
      FileNotFoundError: no such file.
      TrajectoryFileError: a line that is torn, is no JSON, has another format version, or a field
        that is missing, unknown, or of a wrong kind.
    """
    path = epath.Path(path)
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()
    if tail and not allow_torn_tail:
        raise TrajectoryFileError(
            f"{path}:{len(lines) + 1}: the last line has no newline, so its writer was cut off; "
            "resume the rollouts that wrote it, delete the line, or read with allow_torn_tail=True"
        )
    return [_from_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _to_line(trajectory: Trajectory) -> bytes:
    steps = trajectory.steps
    messages = [
        {"role": "system", "content": trajectory.instruction},
        {"role": "user", "content": trajectory.first_observation},
    ]
    for step in steps:
        messages.append({"role": "assistant", "content": step.answer})
        messages.append({"role": "user", "content": step.observation})
    record = {
        "format": FORMAT,
        "task_id": trajectory.task_id,
        "rollout": trajectory.rollout,
        "env": trajectory.env,
        "policy": trajectory.policy,
        "seed": trajectory.seed,
        "messages": messages,
        "actions": [step.action for step in steps],
        "rewards": [step.reward for step in steps],
        "answer_ids": [step.answer_ids for step in steps],
        "answer_logps": [step.answer_logp for step in steps],
        "status": trajectory.status.value,
        "score": trajectory.score,
        "error": trajectory.error,
    }
    if trajectory.start:
        record["start"] = trajectory.start
    where = f"trajectory of task {trajectory.task_id!r}, rollout {trajectory.rollout}"
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}, cannot be written: {error}") from error
    try:
        line = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: only escapes can hold it
        line = json.dumps(record).encode()
    if _from_line(line, where) != trajectory:
        raise ValueError(f"{where}, cannot be written: it would be read back differently")
    return line + b"\n"


def _from_line(line: bytes, where: str) -> Trajectory:
    try:
        record = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        shown = line[:80].decode(errors="replace")
        raise TrajectoryFileError(
            f"{where}: not a JSON object ({error}): {shown!r}; restore the file, or delete the "
            "line so that its episode is sampled again"
        ) from error
    return _parse(record, where)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse(record: Any, where: str) -> Trajectory:
    """Checks every field and makes the record."""

    def fail(field: str, wanted: str, got: Any) -> TrajectoryFileError:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return TrajectoryFileError(f"{where}: field {field!r}: wanted {wanted}, got {shown}")

    def of_type(field: str, kind: type, wanted: str) -> Any:
        value = record[field]
        if type(value) is not kind:
            raise fail(field, wanted, value)
        return value

    def per_step(field: str) -> list[Any]:
        values = of_type(field, list, "a list")
        if len(values) != num_steps:
            raise fail(
                field, f"{num_steps} entries, one per assistant message", f"{len(values)} entries"
            )
        return values

    if type(record) is not dict:
        raise TrajectoryFileError(f"{where}: wanted a JSON object, got {type(record).__name__}")
    if type(record.get("format")) is not int or record["format"] != FORMAT:
        raise TrajectoryFileError(
            f"{where}: field 'format': this version reads format {FORMAT}, got "
            f"{record.get('format')!r}; sample the trajectories again or use the version that "
            "wrote them"
        )
    if missing := [field for field in _FIELDS if field not in record]:
        raise TrajectoryFileError(f"{where}: missing fields: {', '.join(missing)}")
    if unknown := sorted(set(record) - {*_FIELDS, "start"}):
        raise TrajectoryFileError(f"{where}: unknown fields: {', '.join(unknown)}")

    texts = {
        field: of_type(field, str, "a string") for field in ("task_id", "env", "policy", "error")
    }
    rollout = of_type("rollout", int, "a whole number")
    if rollout < 0:
        raise fail("rollout", "a number >= 0", rollout)
    seed = of_type("seed", int, "a whole number")
    score = record["score"]
    if not _is_number(score) or not 0.0 <= score <= 1.0:
        raise fail("score", "a number in [0, 1]", score)
    status = record["status"]
    if status not in list(Status):
        raise fail("status", f"one of {', '.join(Status)}", status)

    contents = _contents(of_type("messages", list, "a list"), where)
    num_steps = len(contents) // 2 - 1
    actions, rewards = per_step("actions"), per_step("rewards")
    answer_ids, answer_logps = per_step("answer_ids"), per_step("answer_logps")
    start = record.get("start", 0)
    if "start" in record and (type(start) is not int or not 0 < start <= num_steps):
        raise fail("start", f"a whole number from 1 to the {num_steps} steps", start)
    steps = []
    for t in range(num_steps):
        if actions[t] is not None and type(actions[t]) is not str:
            raise fail(f"actions[{t}]", "a string or null", actions[t])
        if not _is_number(rewards[t]):
            raise fail(f"rewards[{t}]", "a number", rewards[t])
        if answer_logps[t] is not None and not _is_number(answer_logps[t]):
            raise fail(f"answer_logps[{t}]", "a number or null", answer_logps[t])
        ids = answer_ids[t]
        if ids is not None and (
            type(ids) is not list or any(type(i) is not int or i < 0 for i in ids)
        ):
            raise fail(f"answer_ids[{t}]", "a list of token ids or null", ids)
        steps.append(
            Step(
                answer=contents[2 + 2 * t],
                action=actions[t],
                observation=contents[3 + 2 * t],
                reward=float(rewards[t]),
                answer_ids=None if ids is None else tuple(ids),
                answer_logp=None if answer_logps[t] is None else float(answer_logps[t]),
            )
        )
    return Trajectory(
        rollout=rollout,
        seed=seed,
        instruction=contents[0],
        first_observation=contents[1],
        steps=tuple(steps),
        status=Status(status),
        score=float(score),
        start=start,
        **texts,
    )


def _contents(messages: list[Any], where: str) -> list[str]:
    if len(messages) < 2 or len(messages) % 2:
        raise TrajectoryFileError(
            f"{where}: field 'messages': wanted system, user, then assistant and user for each "
            f"step, got {len(messages)} messages"
        )
    for index, message in enumerate(messages):
        role = ("system", "user", "assistant")[index if index < 2 else 2 - index % 2]
        if (
            type(message) is not dict
            or set(message) != {"role", "content"}
            or message["role"] != role
            or type(message["content"]) is not str
        ):
            shown = repr(message)[:80]
            raise TrajectoryFileError(
                f"{where}: field 'messages[{index}]': wanted a role {role!r} and a text content, "
                f"got {shown}"
            )
    return [message["content"] for message in messages]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
