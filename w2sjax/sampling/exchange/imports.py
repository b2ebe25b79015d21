"""Other people's trajectories: chat records of multi-turn episodes, turned into ours.

Two layouts are read. "sharegpt" is what ETO (arXiv 2403.02502), TraTree (arXiv 2507.18858) and
FastChat write:

    {"id": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …],
     "meta": {"reward": …, "success": …, "terminate_reason": …, "steps": …}}

and "messages" is OpenAI's, which `exports.episode_record` writes as well:

    {"id": …, "messages": [{"role": "system", "content": …}, {"role": "user", …}, …], "score": …}

Either may begin with a system message, or with an instruction of the user that the assistant
answers with "OK", and may then show worked examples before the task. A record that cannot be turned
into a trajectory is refused with a reason, and the fields that were not used are counted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from w2sjax.chat import parse_answer
from w2sjax.chat.actions import ACTION_MARK
from w2sjax.sampling.exchange.conversation import (
    LAYOUTS,
    Conversation,
    divide,
    read_messages,
    with_examples,
)
from w2sjax.sampling.exchange.fields import Fields, RefusedError, number
from w2sjax.sampling.exchange.outcome import SUCCESS_FROM, read_outcome
from w2sjax.sampling.exchange.records import Record
from w2sjax.types import Step, Trajectory

FORMATS = tuple(LAYOUTS)
EXAMPLES = ("drop", "keep")
_GAME_FILES = ("game_file", "meta.error")  # where ETO's ALFWorld records name their game
_GAME = "game.tw-pddl"


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """How records are read.

    Attributes:
      format: "sharegpt" or "messages".
      env: name of the environment that is recorded; "": the record's own, or "imported".
      policy: who acted; "": the record's own, or "imported".
      id_field: where a record names its task, in a field of its own or of its `meta`
        ("meta.error"); "": `id`, `task_id`, or the file's name where it holds that record alone. Of
        `game_file` and `meta.error`, which are paths in ETO's ALFWorld records, the name of the
        game's folder is taken.
      observation_prefix: what the environment's messages begin with, which is taken off with the
        blanks after it; "": nothing. None: "Observation:" for sharegpt, nothing for messages.
      example_messages: messages of worked examples between the instruction and the task (in ETO's
        prompts: ALFWorld 10, ScienceWorld 14, WebShop 8). None: up to the last user message that
        does not begin with the prefix, in the first record that is imported; 0 without a prefix.
      examples: "drop" or "keep" (as text at the end of the instruction).
      task_prefix: taken off the task's text with the blanks after it, where it is there.
      score_scale: scores are divided by it, such as 100.
      clip_scores: cut scores to [0, 1] rather than refuse what is outside.
      default_score: of records that have none, such as an expert's; None: those are refused.
      success_from: "field": what the record's `success` says. "score": whether the score reaches
        `success_score`. "auto": the field where it is the record's own; of `meta.success` and
        without a field, the score, since ETO's says no more than that the environment ended.
      success_score: see `success_from`.
    """

    format: str
    env: str = ""
    policy: str = ""
    id_field: str = ""
    observation_prefix: str | None = None
    example_messages: int | None = None
    examples: str = "drop"
    task_prefix: str = ""
    score_scale: float = 1.0
    clip_scores: bool = False
    default_score: float | None = None
    success_from: str = "auto"
    success_score: float = 1.0

    @property
    def prefix(self) -> str:
        """The observation prefix, the format's own where none was chosen."""
        if self.observation_prefix is None:
            return "Observation:" if self.format == "sharegpt" else ""
        return self.observation_prefix

    def __post_init__(self):
        for name, known in (("format", FORMATS), ("examples", EXAMPLES),
                            ("success_from", SUCCESS_FROM)):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.example_messages is not None and (
            self.example_messages < 0 or self.example_messages % 2
        ):
            raise ValueError(
                f"example_messages: got {self.example_messages}; it must be even and 0 or more, "
                "since examples are turns of a user and an assistant"
            )
        if not 0 < self.score_scale < math.inf:
            raise ValueError(f"score_scale: got {self.score_scale}; it must be greater than 0")
        if self.default_score is not None and not 0 <= self.default_score <= 1:
            raise ValueError(f"default_score: got {self.default_score}; it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A record that became no trajectory."""

    file: str
    record: int
    field: str  # "" where the record as a whole is the trouble
    reason: str

    def __str__(self) -> str:
        field = f", field {self.field!r}" if self.field else ""
        return f"{self.file}, record {self.record}{field}: {self.reason}"


@dataclasses.dataclass
class ImportReport:
    """What became of the records.

    Attributes:
      records: how many were read.
      imported: how many became trajectories.
      refused: the others, in their order.
      unused_fields: name → how many imported records have a value there that was not used.
      notes: what is worth knowing about the imported ones → how many times.
      statuses: of the imported ones.
      example_messages: how many messages were taken to be worked examples → of how many.
      rollouts: task → the numbers of its rollouts so far.
    """

    records: int = 0
    imported: int = 0
    refused: list[Refusal] = dataclasses.field(default_factory=list)
    unused_fields: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    example_messages: collections.Counter[int] = dataclasses.field(
        default_factory=collections.Counter
    )
    rollouts: dict[str, set[int]] = dataclasses.field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """How many tasks the imported ones are of."""
        return len(self.rollouts)

    def facts(self) -> dict[str, Any]:
        """All of it as JSON values; of the rollouts, how many tasks they are of."""
        counters = ("unused_fields", "notes", "statuses", "example_messages")
        facts = {"records": self.records, "imported": self.imported, "tasks": self.tasks}
        facts |= {name: dict(getattr(self, name)) for name in counters}
        return facts | {"refused": [dataclasses.asdict(refusal) for refusal in self.refused]}


def import_records(
    records: Iterable[Record], options: ImportOptions, report: ImportReport
) -> Iterator[Trajectory]:
    """Turns records into trajectories, one by one.

    Rollouts of a task are numbered in the order of the records, but for records that bring a number
    (`rollout`). An answer becomes an action by `chat.parse_answer`, as everywhere. Where a record
    has no `rewards` per step, the last step's reward is the score.

    Args:
      records: from `records.read_records`.
      options: how to read them.
      report: filled while the trajectories are taken. Where one is given several times, rollouts
        are numbered on; the number of worked examples is found anew.

    Yields:
      What could be converted; the rest is in `report.refused`.
    """
    num_examples = options.example_messages
    if num_examples is None and not options.prefix:
        num_examples = 0
    for record in records:
        report.records += 1
        notes: collections.Counter[str] = collections.Counter()
        try:
            fields = Fields(record)
            trajectory, talk = _trajectory(fields, options, num_examples, notes, report.rollouts)
        except RefusedError as refusal:
            reason = Refusal(record.file, record.index, refusal.field, refusal.reason)
            report.refused.append(reason)
            continue
        num_examples = len(talk.examples)
        report.rollouts.setdefault(trajectory.task_id, set()).add(trajectory.rollout)
        report.imported += 1
        report.example_messages[num_examples] += 1
        report.notes += notes
        report.unused_fields.update(fields.unused())
        report.statuses[trajectory.status.value] += 1
        yield trajectory


def _trajectory(
    fields: Fields,
    options: ImportOptions,
    num_examples: int | None,
    notes: collections.Counter[str],
    taken: dict[str, set[int]],
) -> tuple[Trajectory, Conversation]:
    task_id = _task_id(fields, options)
    messages = read_messages(fields, options.format)
    name, prefix = LAYOUTS[options.format][0], options.prefix
    talk = divide(fields, messages, name, prefix, num_examples)
    steps = _steps(talk.turns, prefix, notes)
    if (given := fields.take("meta.steps", int, "a whole number")) not in (None, len(steps)):
        raise RefusedError(
            "meta.steps",
            f"is {given}, but {len(steps)} answers follow {name}[{talk.task_at}], which was taken "
            "to be the task; say how many messages are worked examples (example_messages)",
        )
    status, score = read_outcome(
        fields,
        notes,
        score_scale=options.score_scale,
        clip_scores=options.clip_scores,
        default_score=options.default_score,
        success_from=options.success_from,
        success_score=options.success_score,
    )
    if not steps and status.scored:
        raise RefusedError(name, "no answer follows the task")
    task = talk.task
    if options.task_prefix and not task.startswith(options.task_prefix):
        notes["tasks without the task prefix"] += 1
    elif options.task_prefix:
        task = task.removeprefix(options.task_prefix).lstrip()
    rollouts = taken.get(task_id, set())
    rollout = fields.take("rollout", int, "a whole number")
    if rollout is None:
        rollout = max(rollouts, default=-1) + 1
    elif rollout < 0 or rollout in rollouts:
        raise RefusedError("rollout", f"{rollout} of task {task_id!r} is negative or there already")
    seed = fields.take("seed", int, "a whole number")
    own = {f: fields.take(f, str, "a string") or "imported" for f in ("env", "policy")}
    trajectory = Trajectory(
        task_id=task_id,
        rollout=rollout,
        env=options.env or own["env"],
        policy=options.policy or own["policy"],
        seed=0 if seed is None else seed,
        instruction=with_examples(talk) if options.examples == "keep" else talk.instruction,
        first_observation=task,
        steps=_rewarded(steps, fields, score),
        status=status,
        score=score,
        error=fields.take("error", str, "a string") or "",
    )
    return trajectory, talk


def _task_id(fields: Fields, options: ImportOptions) -> str:
    for field in (options.id_field,) if options.id_field else ("id", "task_id"):
        value = fields.take(field, (int, str), "a string or a whole number")
        if value is None:
            continue
        text = str(value)
        if field in _GAME_FILES:
            text = text.removesuffix(_GAME).rstrip("/").rpartition("/")[2]
        if text:
            return text
    if not options.id_field and fields.record.name:
        return fields.record.name
    raise RefusedError(
        options.id_field or "id",
        f"names no task; the record's fields are: {fields.names()} (choose one as id_field)",
    )


def _steps(turns: Sequence[str], prefix: str, notes: collections.Counter[str]) -> list[Step]:
    steps = []
    for index in range(0, len(turns), 2):
        answer, *following = turns[index : index + 2]
        observation = following[0] if following else ""
        if not following:
            notes["episodes that end with an answer (no observation after it)"] += 1
        elif prefix and observation.startswith(prefix):
            observation = observation.removeprefix(prefix).lstrip()
        elif prefix:
            notes["observations without the prefix"] += 1
        action = parse_answer(answer).action
        if action is None:
            notes["malformed answers (no action)"] += 1
        else:
            _, _, rest = answer.partition(ACTION_MARK)[2].strip().partition("\n")
            notes["answers with lines after the action, which is its first line"] += bool(rest)
        steps.append(Step(answer=answer, action=action, observation=observation))
    return steps


def _rewarded(steps: list[Step], fields: Fields, score: float) -> tuple[Step, ...]:
    rewards = fields.take("rewards", list, "a list")
    if rewards is None:
        rewards = [0.0] * (len(steps) - 1) + [score]
    elif len(rewards) != len(steps):
        raise RefusedError("rewards", f"{len(rewards)} of them for {len(steps)} answers")
    return tuple(
        dataclasses.replace(step, reward=number(reward, f"rewards[{index}]"))
        for index, (step, reward) in enumerate(zip(steps, rewards, strict=False))
    )
