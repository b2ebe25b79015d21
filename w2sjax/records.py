"""What an episode was, in text: the records that environments, files and agents share.

Apart from `w2sjax.types`, which has them too, so that the processes of environments need no JAX.
"""

from __future__ import annotations

import dataclasses
import enum


class Status(enum.StrEnum):
    """How an episode ended. Only the first four say anything about the policy's play."""

    SUCCESS = "success"  # the environment's own verdict
    FAILED = "failed"  # the environment ended the episode without success
    STEP_LIMIT = "step_limit"  # the environment's step limit was reached
    TOKEN_LIMIT = "token_limit"  # the policy's context was full
    ENV_ERROR = "env_error"  # the environment or its worker broke; never scored
    POLICY_ERROR = "policy_error"  # the policy could not produce an answer; never scored

    @property
    def scored(self) -> bool:
        """Whether the episode's score says something about the policy (crashes never do)."""
        return self not in (Status.ENV_ERROR, Status.POLICY_ERROR)


@dataclasses.dataclass(frozen=True)
class Step:
    """One turn of the agent and what the environment answered."""

    answer: str  # what the agent said, verbatim
    action: str | None  # what the one parser read from it; None where it was malformed
    observation: str  # what followed
    reward: float = 0.0  # change of the score
    answer_ids: tuple[int, ...] | None = (
        None  # the sampled token ids, end of turn included; None if nobody sampled
    )
    answer_logp: float | None = (
        None  # log-probability of answer_ids under the sampling policy, in nats
    )


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The record of one rollout. `score` is in [0, 1] and the environment's own."""

    task_id: str
    rollout: int  # index among the rollouts of this task
    env: str
    policy: str  # who acted: "expert", "player", "weak", a method's name
    seed: int
    instruction: str  # system message
    first_observation: str  # first user message
    steps: tuple[Step, ...]
    status: Status
    score: float
    error: str = ""  # what broke, for env_error and policy_error
    start: int = 0  # steps before this one were replayed from an earlier rollout, not sampled

    @property
    def success(self) -> bool:
        return self.status is Status.SUCCESS
