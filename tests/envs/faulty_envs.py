"""Environments that misbehave on request, for the tests of the pool."""

import os
import signal
import sys
import time

from w2sjax.envs import Outcome


class Faulty:
    """Does what its action (or, in an episode of its own expert, its task id) says.

    "raise", "die" (by kill -9), "exit", "hang", "sleep <seconds>", "long" (200 kB observation),
    "pid"; anything else is said back.
    """

    name = "faulty"
    instruction = "Say something."

    def __init__(self, *, max_steps: int = 5, broken: str = ""):
        if broken == "raise":
            raise OSError("no engine on this machine")
        if broken == "exit":
            os._exit(7)
        if broken == "value":
            raise ValueError("env.options.broken: expected no value")
        self.max_steps = max_steps

    def task_ids(self, split, count=None):
        if split != "train":
            raise ValueError(f"unknown split {split!r}")
        return [f"ok {i}" for i in range(count)]

    def reset(self, task_id):
        self._task_id = task_id
        self._steps = 0
        if task_id.startswith("at reset: "):
            self.step(task_id.removeprefix("at reset: "))
        return f"task {task_id}"

    def step(self, action):
        self._steps += 1
        match action.split():
            case ["raise"]:
                raise ArithmeticError("as told")
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["exit"]:
                os._exit(3)
            case ["hang"]:
                time.sleep(3600)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["long"]:
                return self._outcome("x" * 200_000)
            case ["pid"]:
                return self._outcome(str(os.getpid()))
            case ["modules"]:
                return self._outcome(" ".join(sys.modules))
        return self._outcome(action)

    def _outcome(self, observation):
        return Outcome(observation, min(1.0, self._steps / 10), False, False)

    def admissible_actions(self):
        return [f"step {self._steps}"]

    def expert_action(self):
        return self._task_id if self._steps else "first"

    def close(self):
        pass
