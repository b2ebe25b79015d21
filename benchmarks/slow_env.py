"""An environment for `benchmarks/sampling.py`; a file of its own, since each worker imports it."""

from __future__ import annotations

import time

from w2sjax.envs import Outcome

LATENCY_S = 0.05


class SlowEnv:
    """Answers after a while, as an environment behind a network does; for ever the same."""

    name = "slow"
    instruction = "Say a number."
    max_steps = 8

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        return [f"{split} {i}" for i in range(count or 1)]

    def reset(self, task_id: str) -> str:
        time.sleep(LATENCY_S)
        self._task, self._steps = task_id, 0
        return f"You are in {task_id}."

    def step(self, action: str) -> Outcome:
        time.sleep(LATENCY_S)
        self._steps += 1
        return Outcome(f"After {action} you are in {self._task} still.", 0.0, False, False)

    def admissible_actions(self) -> list[str]:
        return ["go on"]

    def expert_action(self) -> str:
        return f"go on to {self._steps}"

    def close(self) -> None:
        pass
