"""Many environments at once, in this process or in worker processes that may crash and hang.

One environment object per slot. A batched call runs all workers in parallel and returns when all
have answered. What goes wrong with an environment becomes an `EnvFailure` in its slot, never an
exception, so that it can be counted and is never scored as play.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, Literal, NamedTuple

from w2sjax.envs.base import Outcome
from w2sjax.envs.players import PlayedEpisode
from w2sjax.envs.worker import SlotEnvs, run_worker
from w2sjax.records import Status

_START_TIMEOUT_S = 180.0  # a process that imports its environment and makes the first one
_BACK_OFF_S, _MOST_BACK_OFF_S = 0.2, 5.0  # before a worker that keeps dying is started again
_CLOSE_TIMEOUT_S = 5.0  # to close environments in peace; after that processes are killed


@dataclasses.dataclass(frozen=True)
class Reset:
    """A started episode."""

    first_observation: str
    instruction: str
    max_steps: int


@dataclasses.dataclass(frozen=True)
class EnvFailure:
    """The environment or its worker broke; the slot has no episode until its next reset."""

    message: str


@dataclasses.dataclass(frozen=True)
class PlayRequest:
    """One episode for `EnvPool.play`: the arguments of `players.play`."""

    task_id: str
    random_action_rate: float = 0.0
    seed: int = 0


_Numbered = tuple[int, PlayRequest]  # with its place among all requests
Operation = Literal["reset", "step", "actions"]
Answer = Reset | Outcome | list[str] | EnvFailure
_MAKE: Mapping[str, Any] = {"reset": Reset, "step": Outcome, "actions": list}


class _Async(NamedTuple):
    """Whose request one of `EnvPool.submit` is."""

    slot: int


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, index: int, name: str, options: Mapping[str, Any]):
        self.index = index
        self.pending: dict[int, Hashable] = {}  # serial → whose request it is
        self.ready = False
        self.heard = time.monotonic()  # when it last said anything or was asked for something
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_worker,
            args=(theirs, name, dict(options)),
            name=f"{name} worker {index}",
            daemon=True,
        )
        # Ctrl-C is blocked until the child ignores it; a signal for this process waits meanwhile.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        # The child would import this program's main module, and JAX and all else with it: seconds
        # and some hundred megabytes that no environment needs. So it is not told of one.
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def await_ready(self) -> None:
        """Waits until the process has made its first environment.

        Raises:
          ValueError: the environment's name or options are wrong.
          RuntimeError: it cannot be made, or the process died or hung before it was.
        """
        if self.ready:
            return
        try:
            if not self.connection.poll(_START_TIMEOUT_S):
                raise RuntimeError(f"{self.process.name} did not start in {_START_TIMEOUT_S:.0f} s")
            kind, *details = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(_CLOSE_TIMEOUT_S)
            raise RuntimeError(
                f"{self.process.name} died at its start (exit code {self.process.exitcode}); its "
                "own error output says why"
            ) from error
        if kind == "unusable":
            error_kind, message = details
            if error_kind == "wrong":
                raise ValueError(message)
            raise RuntimeError(f"{self.process.name} cannot start: {error_kind}: {message}")
        self.ready = True
        self.heard = time.monotonic()

    def ask(self, requests: list[tuple[int, str, int | None, Any]]) -> None:
        """Sends requests; one that cannot be sent shows as a dead process when replies are read."""
        try:
            self.connection.send(requests)
        except OSError:
            self.process.kill()  # a broken pipe has no other use

    def kill(self) -> int | None:
        """Ends the process at once; returns its exit code."""
        died = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode if died is None else died


class EnvPool:
    """A pool of environments, one per slot; a context manager.

    Args:
      name: what `make_env` takes: a registered name, or "module:Class".
      options: keyword arguments of the environment's class; they must be picklable for workers.
      num_slots: number of slots; slots are 0 … num_slots − 1.
      num_workers: number of processes, at most `num_slots`; slot s lives in worker s modulo
        num_workers. 0 runs everything in this process: best for fast environments, and without the
        protection against crashes and hangs (exceptions are caught all the same).
      timeout_s: a worker that gives no answer for so long while one of its environments is at work
        is killed and started again.
      max_restarts: how many such starts, of crashed workers too, there may be in the pool's life. A
        worker that dies again before it has answered anything is started after a pause, which
        doubles each time up to 5 s.

    Attributes:
      restarts: how many workers were started again so far.

    Raises:
      ValueError: a wrong argument, or wrong options of the environment.
      RuntimeError: the environment cannot be made.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        num_slots: int,
        num_workers: int = 0,
        timeout_s: float = 60.0,
        max_restarts: int = 20,
    ):
        if num_slots < 1:
            raise ValueError(f"num_slots: expected 1 or more, got {num_slots}")
        if not 0 <= num_workers <= num_slots:
            raise ValueError(f"num_workers: expected 0 to num_slots={num_slots}, got {num_workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        if max_restarts < 0:
            raise ValueError(f"max_restarts: expected 0 or more, got {max_restarts}")
        self.num_slots = num_slots
        self.restarts = 0
        self._name = name
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._max_restarts = max_restarts
        self._serials = itertools.count()
        self._running: set[int] = set()  # slots whose episode can go on
        self._lost: dict[int, str] = {}  # slots whose episode broke: why
        self._workers: list[_Worker] = []
        self._local: SlotEnvs | None = None
        self._closed = False
        self._deaths = [0] * num_workers  # of each worker, since it last answered
        self._owing: dict[int, str] = {}  # slot → the operation that `submit` asked for
        self._answers: list[tuple[int, Answer]] = []  # that `poll` has not returned
        self._call = 0  # counts calls, so that an interrupted `play` can tell
        if num_workers == 0:
            self._local = SlotEnvs(name, self._options)
            return
        try:
            for index in range(num_workers):
                self._workers.append(_Worker(index, name, self._options))
            for worker in self._workers:
                worker.await_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def task_ids(self, split: str, count: int | None = None) -> list[str]:
        """The environment's own `task_ids`.

        Raises:
          ValueError: the environment's own complaint about the split or the count.
          RuntimeError: the environment broke.
        """
        self._drop_stale()
        slot = next((slot for slot in range(self.num_slots) if slot not in self._running), 0)
        request = ("task_ids", slot, (split, count))
        if self._local is not None:
            reply = self._local.handle(*request, _no_beat)
        else:
            self._submit(slot % len(self._workers), {slot: request})
            [(_, reply)] = self._collect()
        if reply[0] == "wrong":
            raise ValueError(reply[1])
        if reply[0] == "failure":
            raise RuntimeError(f"{self._name}: {reply[1]}")
        return reply[1]

    def reset(self, requests: Mapping[int, str]) -> dict[int, Reset | EnvFailure]:
        """Starts episodes.

        Args:
          requests: slot → task id. An episode under way in such a slot is given up.

        Returns:
          slot → the start of its episode, or what broke.
        """
        return self._ask("reset", requests)

    def step(self, requests: Mapping[int, str]) -> dict[int, Outcome | EnvFailure]:
        """Performs one action in each of some slots.

        Args:
          requests: slot → action.

        Returns:
          slot → the outcome, or what broke (now, or since the last call).

        Raises:
          ValueError: a slot in which no episode was started.
        """
        return self._ask("step", requests)

    def admissible_actions(self, slots: Collection[int]) -> dict[int, list[str] | EnvFailure]:
        """The admissible actions of some slots; like `step` in all else."""
        return self._ask("actions", dict.fromkeys(slots))

    def submit(self, operation: Operation, requests: Mapping[int, str]) -> None:
        """Asks for resets or steps without waiting for them: `poll` returns what came of them.

        Between the first `submit` and the last `poll` nothing else may be asked of the pool: what
        is outstanding would be given up.

        Args:
          operation: "reset", with slot → task id; "step", with slot → action; or "actions", with
            slot → anything.
          requests: slots of which nothing is outstanding.

        Raises:
          ValueError: a slot that still owes an answer, or a step where no episode was started.
        """
        self._check_slots(requests)
        if self._closed:
            raise RuntimeError("this EnvPool is closed")
        for slot in requests:
            if slot in self._owing:
                raise ValueError(f"slot {slot} still owes the answer to {self._owing[slot]!r}")
            if operation != "reset" and slot not in self._running and slot not in self._lost:
                raise ValueError(f"slot {slot} has no episode: call reset first")
        batches: dict[int, dict[Hashable, tuple]] = {}
        for slot, argument in requests.items():
            if operation == "reset":
                self._running.discard(slot)
                self._lost.pop(slot, None)
            elif slot in self._lost:
                self._answers.append((slot, EnvFailure(self._lost[slot])))
                continue
            self._owing[slot] = operation
            home = slot % len(self._workers) if self._workers else 0
            batches.setdefault(home, {})[_Async(slot)] = (operation, slot, argument)
        for home, batch in batches.items():
            if self._local is None:
                self._submit(home, batch)
                continue
            for key, (_, slot, argument) in batch.items():
                self._take(key, self._local.handle(operation, slot, argument, _no_beat))

    def poll(self, *, wait_s: float | None = None) -> dict[int, Answer]:
        """What has come of `submit`.

        Args:
          wait_s: how long to wait where nothing has come yet; None waits until something has, or
            nothing is outstanding.

        Returns:
          slot → the start of its episode, the outcome of its action, its admissible actions, or
          what broke.
        """
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while not self._answers and self._owing:
            left = None if deadline is None else deadline - time.monotonic()
            for key, reply in self._receive(left if left is None else max(0.0, left)):
                self._take(key, reply)
            if left is not None and left <= 0:
                break
        while self._owing:  # all that is there, without waiting
            replies = self._receive(0.0)
            if not replies:
                break
            for key, reply in replies:
                self._take(key, reply)
        answers, self._answers = dict(self._answers), []
        return answers

    @property
    def outstanding(self) -> int:
        """Slots that owe an answer to `submit`, or whose answer was not polled yet."""
        return len(self._owing) + len(self._answers)

    def _take(self, key: Hashable, reply: tuple) -> None:
        """Notes a reply to `submit`."""
        if not isinstance(key, _Async):
            return  # of a call that was interrupted
        operation = self._owing.pop(key.slot)
        kind, *details = reply
        if kind == "failure":
            self._answers.append((key.slot, self._fail(key.slot, details[0])))
            return
        if operation == "reset":
            self._running.add(key.slot)
        self._answers.append((key.slot, _MAKE[operation](*details)))

    def play(
        self, requests: Sequence[PlayRequest]
    ) -> Iterator[tuple[int, PlayedEpisode | EnvFailure]]:
        """Plays whole episodes inside the workers, without round trips.

        Episodes that are under way in slots are given up. A worker plays one task after the other.

        Args:
          requests: what to play.

        Yields:
          (index of the request, its episode or what broke), as they come.

        Raises:
          RuntimeError: the pool was used for something else before all episodes had come.
        """
        self._drop_stale()
        call = self._call
        for slot in self._running:
            self._lost[slot] = "the episode was given up for EnvPool.play"
        self._running.clear()
        if self._local is not None:
            for index, request in enumerate(requests):
                yield index, _played(self._local.handle(*_play_request(0, request), _no_beat))
                self._check_alone(call)
            return
        by_task: dict[str, deque[_Numbered]] = {}
        for index, request in enumerate(requests):
            by_task.setdefault(request.task_id, deque()).append((index, request))
        waiting = deque(by_task.values())
        begun: dict[int, deque[_Numbered]] = {worker.index: deque() for worker in self._workers}
        for worker in self._workers:
            self._play_next(worker.index, waiting, begun)
        for (home, index), reply in self._collect():
            self._play_next(home, waiting, begun)
            yield index, _played(reply)
            self._check_alone(call)

    def _check_alone(self, call: int) -> None:
        if self._closed or self._call != call:
            raise RuntimeError("EnvPool.play: the pool was used or closed before the last episode")

    def _play_next(
        self, home: int, waiting: deque[deque[_Numbered]], begun: dict[int, deque[_Numbered]]
    ) -> None:
        """Gives a worker its next episode, if there is one: of its task, of a task that no worker
        has begun, or of another worker's. What an environment found out about a task, such as a
        long plan, is found out once.
        """
        if not begun[home]:
            begun[home] = waiting.popleft() if waiting else max(begun.values(), key=len)
        if begun[home]:
            index, request = begun[home].popleft()
            self._submit(home, {(home, index): _play_request(home, request)})

    def close(self) -> None:
        """Closes the environments and ends all workers; may be called twice."""
        self._closed = True
        if self._local is not None:
            self._local.close()
            self._local = None
        for worker in self._workers:
            if worker.ready and not worker.pending:
                worker.ask(None)
            else:
                worker.process.kill()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.kill()
        self._workers = []

    # ---------------------------------------------------------------------------------- requests

    def _check_slots(self, slots: Collection[int]) -> None:
        for slot in slots:
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"slot {slot}: this pool has slots 0 to {self.num_slots - 1}")

    def _ask(self, operation: Operation, requests: Mapping[int, Any]) -> dict[int, Any]:
        self._drop_stale()
        self.submit(operation, requests)
        results: dict[int, Any] = {}
        while self.outstanding:
            results |= self.poll()
        return results

    def _fail(self, slot: int, message: str) -> EnvFailure:
        self._running.discard(slot)
        self._lost[slot] = f"{self._name}: {message}"
        return EnvFailure(self._lost[slot])

    def _drop_stale(self) -> None:
        """Reads away what an interrupted call has left; refuses to work after the end."""
        if self._closed:
            raise RuntimeError("this EnvPool is closed")
        self._call += 1
        for slot in self._owing:
            self._running.discard(slot)
            self._lost[slot] = "the episode was given up for another call of the pool"
        self._owing.clear()
        self._answers.clear()
        for _ in self._collect():
            pass

    def _submit(self, home: int, batch: Mapping[Hashable, tuple[str, int | None, Any]]) -> None:
        worker = self._workers[home]
        worker.await_ready()
        if not worker.pending:  # it was idle until now
            worker.heard = time.monotonic()
        requests = []
        for key, request in batch.items():
            serial = next(self._serials)
            worker.pending[serial] = key
            requests.append((serial, *request))
        worker.ask(requests)

    def _collect(self) -> Iterator[tuple[Any, tuple]]:
        """Yields (key, reply) until nothing is pending; workers that die or hang are replaced."""
        while any(worker.pending for worker in self._workers):
            yield from self._receive(None)

    def _receive(self, wait_s: float | None) -> list[tuple[Any, tuple]]:
        """The replies (key, reply) that have come, after waiting for one for so long at most (None:
        for as long as it takes); workers that die or hang are replaced.
        """
        busy = [worker for worker in self._workers if worker.pending]
        if not busy:
            return []
        left = max(0.0, min(worker.heard for worker in busy) + self._timeout_s - time.monotonic())
        heard = wait(
            [worker.connection for worker in busy], left if wait_s is None else min(left, wait_s)
        )
        replies: list[tuple[Any, tuple]] = []
        for worker in busy:
            if worker.connection in heard:
                try:
                    serial, reply = worker.connection.recv()
                except (EOFError, OSError):
                    replies += self._replace(worker, "died")
                    continue
                worker.heard = time.monotonic()
                if reply[0] != "beat":
                    self._deaths[worker.index] = 0
                    replies.append((worker.pending.pop(serial), reply))
            elif (
                time.monotonic() >= worker.heard + self._timeout_s
                and not worker.connection.poll()  # it may have spoken since we looked
            ):
                replies += self._replace(worker, f"gave no answer for {self._timeout_s:g} s")
        return replies

    def _replace(self, worker: _Worker, what: str) -> list[tuple[Any, tuple]]:
        """Kills a worker and starts another; returns a failure for each of its pending requests."""
        if what == "died":
            worker.process.join(_CLOSE_TIMEOUT_S)
            what = f"died (exit code {worker.kill()})"
        else:
            worker.kill()
        message = f"{worker.process.name} {what}"
        self.restarts += 1
        for slot in [s for s in self._running if s % len(self._workers) == worker.index]:
            self._fail(slot, message)
        if self.restarts > self._max_restarts:
            self.close()
            raise RuntimeError(
                f"env pool: {message}, and max_restarts={self._max_restarts} is used up. Look for "
                "the reason in the workers' error output, or allow more restarts or a longer "
                "timeout_s"
            )
        deaths = self._deaths[worker.index]
        if deaths:  # once is an accident
            time.sleep(min(_MOST_BACK_OFF_S, _BACK_OFF_S * 2 ** (deaths - 1)))
        self._deaths[worker.index] += 1
        self._workers[worker.index] = _Worker(worker.index, self._name, self._options)
        return [(key, ("failure", message)) for key in worker.pending.values()]


def _play_request(slot: int, request: PlayRequest) -> tuple[str, int, tuple]:
    return "play", slot, (request.task_id, request.random_action_rate, request.seed)


def _played(reply: tuple) -> PlayedEpisode | EnvFailure:
    kind, details = reply
    if kind == "failure":
        return EnvFailure(details)
    return PlayedEpisode(**{**details, "status": Status(details["status"])})


def _no_beat() -> None:
    """In this process nobody waits for signs of life."""
