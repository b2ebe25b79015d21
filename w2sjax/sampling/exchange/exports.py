"""Our trajectories as messages: what TRL's trainers and other readers of chat data take.

    episode_record     {"messages": […], …}: a whole episode; `imports` reads it back
    sft_record         {"messages": […], …}: up to the last answer that a target learns
    preference_record  {"prompt": […], "chosen": […], "rejected": […], …}

A message is {"role", "content"}, its text as it was. The token ids of sampled answers are not
written: they are one tokenizer's own. Where a text spells a tokenizer's special token, transformers
(and so TRL) reads that token, while `chat.ChatTemplate` reads text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from w2sjax.types import Trajectory

SYSTEM = ("message", "user")
CONTEXTS = ("same", "chosen")

Message = dict[str, str]


class ContextsDifferError(ValueError):
    """The sides of a pair have no common prompt: their texts differ before they part."""


def to_messages(
    trajectory: Trajectory, *, system: str = "message", last_step: int | None = None
) -> list[Message]:
    """An episode as a conversation.

    Args:
      trajectory: the episode.
      system: "message": the instruction is a system message, also where it is empty; "user": it
        opens the first user message, for templates without a system role (as `chat.ChatTemplate`
        does for them).
      last_step: what follows the answer of this step is left out; nothing where None.

    Raises:
      ValueError: unknown `system`.
    """
    opening = trajectory.first_observation
    if system == "message":
        messages = [_message("system", trajectory.instruction), _message("user", opening)]
    elif system == "user":
        instruction = trajectory.instruction
        messages = [_message("user", f"{instruction}\n\n{opening}" if instruction else opening)]
    else:
        raise ValueError(f"system: got {system!r}; known: {', '.join(SYSTEM)}")
    steps = trajectory.steps if last_step is None else trajectory.steps[: last_step + 1]
    for step in steps:
        messages.append(_message("assistant", step.answer))
        messages.append(_message("user", step.observation))
    if last_step is not None:
        messages.pop()
    return messages


def episode_record(trajectory: Trajectory, *, system: str = "message") -> dict[str, Any]:
    """A whole episode, what followed its last answer included.

    `imports.import_records` makes the same trajectory of it but for the sampled token ids and their
    log-probabilities, where `system` is "message".
    """
    return {
        "messages": to_messages(trajectory, system=system),
        **_facts(trajectory),
        "env": trajectory.env,
        "policy": trajectory.policy,
        "seed": trajectory.seed,
        "rewards": [step.reward for step in trajectory.steps],
        "error": trajectory.error,
    }


def sft_record(
    trajectory: Trajectory, step_weights: Sequence[float], *, system: str = "message"
) -> dict[str, Any] | None:
    """What likelihood training learns of an episode.

    Args:
      trajectory: the episode.
      step_weights: what the answer of each step counts; those past the last step are ignored.
      system: see `to_messages`.

    Returns:
      The messages up to the last answer whose weight is not 0, and `step_weights`, one per answer
      among them; None where no answer counts.
    """
    weights = [float(weight) for weight in step_weights[: len(trajectory.steps)]]
    while weights and not weights[-1]:
        weights.pop()
    if not weights:
        return None
    messages = to_messages(trajectory, system=system, last_step=len(weights) - 1)
    return {"messages": messages, **_facts(trajectory), "step_weights": weights}


def preference_record(
    chosen: Trajectory,
    rejected: Trajectory,
    *,
    start: int,
    chosen_end: int,
    rejected_end: int,
    value_gap: float,
    system: str = "message",
    context: str = "same",
) -> dict[str, Any]:
    """A pair of continuations: the steps start … end − 1 of two episodes of a task.

    Args:
      chosen, rejected: the episodes.
      start, chosen_end, rejected_end: as in `targets.PairSet`.
      value_gap: by how much the chosen side is worth more.
      system: see `to_messages`.
      context: what the prompt is where the episodes' texts differ before they part (their thoughts
        may, since trees merge on actions): "same" refuses, "chosen" takes the chosen side's for
        both.

    Returns:
      `prompt`, all messages up to the parting; `chosen` and `rejected`, those after it, each from
      an answer to an answer; and what is known of both.

    Raises:
      ContextsDifferError: the texts differ before the parting, and `context` is "same".
      ValueError: unknown `system` or `context`.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context: got {context!r}; known: {', '.join(CONTEXTS)}")
    sides = {}
    parting = 2 * start + (2 if system == "message" else 1)
    ends = {"chosen": (chosen, chosen_end), "rejected": (rejected, rejected_end)}
    for name, (trajectory, end) in ends.items():
        messages = to_messages(trajectory, system=system, last_step=end - 1)
        sides[name] = messages[:parting], messages[parting:]
    if context == "same" and sides["chosen"][0] != sides["rejected"][0]:
        raise ContextsDifferError(
            f"task {chosen.task_id!r}: rollouts {chosen.rollout} and {rejected.rollout} differ in "
            f"their texts before step {start}, where they part"
        )
    return {
        "prompt": sides["chosen"][0],
        "chosen": sides["chosen"][1],
        "rejected": sides["rejected"][1],
        "value_gap": float(value_gap),
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "task_id": chosen.task_id,
        "chosen_rollout": chosen.rollout,
        "rejected_rollout": rejected.rollout,
        "start": start,
    }


def _facts(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "task_id": trajectory.task_id,
        "rollout": trajectory.rollout,
        "status": trajectory.status.value,
        "score": trajectory.score,
    }


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
