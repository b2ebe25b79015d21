"""The side of `EnvPool` that owns environments: one per slot, here or in a worker process.

Requests and replies are plain tuples, texts and dicts. A request is (operation, slot, argument):
"reset" with a task id, "step" with an action, "actions", "play" with (task id, rate, seed),
"task_ids" with (split, count). A reply starts with its kind: the operation, "failure", or, from a
process that is still busy, "beat".
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from w2sjax.envs.base import Env, Outcome, make_env
from w2sjax.envs.players import play

_BEAT_S = 0.5  # how often a long episode says that it goes on


class SlotEnvs:
    """Environments by slot. The first one is made at once, so that a broken set-up shows early.

    An operation that raises becomes a ("failure", message) reply; that slot's environment is given
    up and made anew when it is needed again.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        self._make = lambda: make_env(name, **options)
        self._envs: dict[int | None, Env] = {None: self._make()}  # None: not given to a slot yet

    def handle(
        self, operation: str, slot: int | None, argument: Any, beat: Callable[[], None]
    ) -> tuple:
        """Performs one request; calls `beat` at each step of an episode that it plays."""
        try:
            if operation == "step":
                outcome = self._envs[slot].step(argument)
                return "step", outcome.observation, outcome.score, outcome.done, outcome.success
            if operation == "actions":
                return "actions", list(self._envs[slot].admissible_actions())
            if slot not in self._envs:  # the free one first: environments may be costly
                free = self._envs.pop(None, None)
                self._envs[slot] = self._make() if free is None else free
            env = self._envs[slot]
            if operation == "reset":
                first_observation = env.reset(argument)
                return "reset", first_observation, env.instruction, env.max_steps
            if operation == "task_ids":
                return _task_ids(env, *argument)
            task_id, rate, seed = argument
            episode = play(_Beating(env, beat), task_id, random_action_rate=rate, seed=seed)
            return "play", {**vars(episode), "status": str(episode.status)}
        except Exception as error:  # whatever an environment raises concerns its own slot only
            self._discard(slot)
            return "failure", f"{operation} raised {type(error).__name__}: {error}"

    def _discard(self, slot: int | None) -> None:
        env = self._envs.pop(slot, None)
        if env is not None:
            _close_broken(env)

    def close(self) -> None:
        """Closes all environments."""
        for slot in list(self._envs):
            self._discard(slot)


def _task_ids(env: Env, split: str, count: int | None) -> tuple:
    try:
        return "task_ids", list(env.task_ids(split, count))
    except ValueError as error:  # a wrong question, not a broken environment
        return "wrong", str(error)


def _close_broken(env: Env) -> str:
    """Closes an environment that may be broken; returns what it raised, if anything."""
    try:
        env.close()
    except Exception as error:  # it is given up anyway, and its slot's failure is reported already
        return repr(error)
    return ""


class _Beating:
    """An environment that gives a sign of life at every step."""

    def __init__(self, env: Env, beat: Callable[[], None]):
        self._env = env
        self._beat = beat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: str) -> Outcome:
        self._beat()
        return self._env.step(action)


def run_worker(connection: Connection, name: str, options: Mapping[str, Any]) -> None:
    """The main function of a worker process: says ("ready",), then answers requests.

    A message is a list of (serial, operation, slot, argument), or None to end; each request is
    answered by (serial, reply) as soon as it is done. Ctrl-C is the parent's business; when the
    parent dies, so does the worker, even from within an environment that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        envs = SlotEnvs(name, options)
    except Exception as error:  # said to the parent, which raises it
        kind = "wrong" if isinstance(error, ValueError) else type(error).__name__
        connection.send(("unusable", kind, str(error)))
        return
    connection.send(("ready",))
    try:
        while (requests := connection.recv()) is not None:
            for serial, operation, slot, argument in requests:
                beat = _Beat(connection, serial)
                connection.send((serial, envs.handle(operation, slot, argument, beat)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed its end: nobody is there to be told anything
    finally:
        envs.close()


class _Beat:
    """Tells the parent now and then that a request is being worked on."""

    def __init__(self, connection: Connection, serial: int):
        self._connection = connection
        self._serial = serial
        self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last > _BEAT_S:
            self._last = now
            self._connection.send((self._serial, ("beat",)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
