"""ScienceWorld simulators that share one JVM per process.

The simulator's jar keeps exactly three things outside its simulator objects: the counter of object
ids, the set of simplifications, and Scala's global random numbers. `Simulator` saves and restores
them when turns pass from one simulator to another, so that each behaves as if it were alone in its
JVM. One JVM then serves all slots of a worker process: its code is compiled once, and a simulator
costs about 1 MB.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from w2sjax.envs import jvm

# The generator behind scala.util.Random is java.util.Random: 48 bits, x ← x·a + c, output x >> 16.
_LCG_A, _LCG_C, _LCG_MASK = 0x5DEECE66D, 0xB, (1 << 48) - 1
_LCG_A_INVERSE = pow(_LCG_A, -1, 1 << 48)


class _SharedState(NamedTuple):
    """What the jar keeps in globals, as one simulator left it."""

    next_object_id: int
    random_state: int  # the 48 bits of java.util.Random
    simplifications: str


def check_packages() -> None:
    """Raises ImportError, saying what to install, where ScienceWorld's packages are missing."""
    jvm.check_packages("ScienceWorld", ("scienceworld", "py4j"), "scienceworld")


class _Jvm(jvm.Jvm):
    """A running JVM with ScienceWorld's jar, and whose turn it is."""

    title = "ScienceWorld"
    # The simulator walks through hash sets of objects that have no hash of their own: by default
    # the order in which things are listed, and the gold player's choices, would differ from run to
    # run. One hash for all objects makes it the order of insertion, for a fifth more time. (A
    # quarter of the heap is for young objects, -Xmn: a step makes megabytes of garbage, and nearly
    # nothing stays.)
    options = (
        "-Xmn{quarter}m",
        "-XX:+UseSerialGC",
        "-XX:+IgnoreUnrecognizedVMOptions",
        "-XX:+UnlockExperimentalVMOptions",
        "-XX:hashCode=2",
    )

    def __init__(self, java: str, heap_mb: int):
        super().__init__(java, heap_mb)
        java_side = self.gateway.jvm
        self.new_server = java_side.scienceworld.runtime.pythonapi.PythonInterface
        self._ids = java_side.util.UniqueIdentifier
        self._simplifier = java_side.main.scala.scienceworld.runtime.SimplifierProcessor
        self.random = getattr(getattr(java_side.scala.util, "Random$"), "MODULE$")
        self.lock = threading.RLock()
        self.current: Simulator | None = None
        self.simplifications = ""

    def files(self) -> tuple[str, str]:
        import scienceworld.constants

        # The jar reads a table from its own folder.
        return scienceworld.constants.JAR_PATH, scienceworld.constants.BASEPATH

    def save(self, simplifications: str) -> _SharedState:
        first, second = (self.random.nextInt() & 0xFFFFFFFF for _ in range(2))
        return _SharedState(self._ids.count(), _lcg_state(first, second), simplifications)

    def restore(self, state: _SharedState) -> None:
        getattr(self._ids, "count_$eq")(state.next_object_id)
        self.random.setSeed(state.random_state ^ _LCG_A)  # setSeed scrambles with the same constant
        if state.simplifications != self.simplifications:
            self._simplifier.parseSimplificationStr(state.simplifications)
            self.simplifications = state.simplifications


def _lcg_state(first: int, second: int) -> int:
    """The state of java.util.Random before it gave two 32-bit numbers (16 bits by search)."""
    after_first = (np.uint64(first) << np.uint64(16)) + np.arange(1 << 16, dtype=np.uint64)
    after_second = (after_first * np.uint64(_LCG_A) + np.uint64(_LCG_C)) & np.uint64(_LCG_MASK)
    found = np.flatnonzero(after_second >> np.uint64(16) == np.uint64(second))
    return (int(after_first[found[0]]) - _LCG_C) * _LCG_A_INVERSE & _LCG_MASK


class Simulator:
    """One ScienceWorld simulator, behaving as if it had a JVM of its own.

    Errors: a call raises RuntimeError where the JVM has died, ran out of memory or threw. The
    simulator is then of no more use; a new one starts a new JVM.

    Args:
      heap_mb: largest heap of the JVM, in MB, shared by all simulators of this process with the
      same value.
    """

    def __init__(self, heap_mb: int):
        check_packages()
        self._jvm: _Jvm | None = jvm.acquire(_Jvm, heap_mb)
        self._state: _SharedState | None = None
        self._simplifications = ""
        with self._turn(loading=True):
            self._server = self._jvm.new_server()
            self._forget_task_library()

    @property
    def pid(self) -> int:
        """Process id of the JVM."""
        return self._alive().process.pid

    @property
    def usable(self) -> bool:
        """Whether the simulator is open and its JVM runs."""
        return self._jvm is not None and self._jvm.running

    def load(self, task: str, variation: int, simplification: str) -> None:
        """Starts a task anew (about 25 ms once the JVM is warm)."""
        self._load(task, variation, simplification, False)

    def gold_actions(self, task: str, variation: int, simplification: str) -> list[str]:
        """Starts a task anew and returns the action sequence of the package's own gold player."""
        self._load(task, variation, simplification, True)
        with self._turn():
            joined = self._jvm.join("\n", self._server.getGoldActionSequence())
        return joined.split("\n") if joined else []

    def step(self, action: str) -> tuple[str, float, bool]:
        """Performs an action: (text, score in [−1, 1], completed)."""
        with self._turn():
            text = self._server.step(action)
            return text, float(self._server.getScore()), bool(self._server.getCompleted())

    def task_description(self) -> str:
        with self._turn():
            return self._server.freeActionTaskDesc()

    def look(self) -> str:
        """What `look around` shows, without taking a step."""
        with self._turn():
            return self._server.freeActionLook()

    def inventory(self) -> str:
        with self._turn():
            return self._server.freeActionInventory()

    def score(self) -> float:
        with self._turn():
            return float(self._server.getScore())

    def objects(self) -> list[str]:
        """Names of the visible objects, inventory left out, sorted (about 2 ms)."""
        with self._turn():
            return sorted(set(json.loads(self._server.getPossibleObjectReferentLUTJSON()).values()))

    def valid_actions(self) -> list[str]:
        """All actions that the simulator holds valid now, sorted (hundreds, in 10 ms and more).

        Names are drawn at random where an object has several: always from the same seed here, and
        the episode's own random numbers stay untouched.
        """
        with self._turn():
            own = self._jvm
            state = own.save(self._simplifications)
            own.random.setSeed(0)
            joined = own.join("\n", self._server.getValidActionObjectCombinations())
            own.restore(state)
        return sorted(set(joined.split("\n"))) if joined else []

    def folds(self, task: str) -> dict[str, list[int]]:
        """The official train, dev and test variations of a task, asked of the package itself."""
        with self._turn(loading=True):
            self._server.load(task, 0, "", False)
            return {
                "train": list(self._server.getVariationsTrain()),
                "dev": list(self._server.getVariationsDev()),
                "test": list(self._server.getVariationsTest()),
            }

    def close(self) -> None:
        """Lets go of the simulator; the last one out ends the JVM. May be called twice."""
        own, self._jvm = self._jvm, None
        if own is None:
            return
        with own.lock:
            if own.current is self:
                own.current = None
        jvm.release(own)

    def _alive(self) -> _Jvm:
        if self._jvm is None:
            raise RuntimeError("this ScienceWorld simulator is closed; make a new one")
        return self._jvm

    def _load(self, task: str, variation: int, simplification: str, gold: bool) -> None:
        with self._turn(loading=True):
            self._jvm.answer_at_once()
            error = self._server.load(task, variation, simplification, gold)
            if error:
                raise ValueError(
                    f"ScienceWorld cannot load {task!r}, variation {variation}: {error}"
                )
            # "easy" means different simplifications for different tasks: ask which.
            self._simplifications = self._server.agentInterface().get().simplificationStr()
            self._jvm.simplifications = self._simplifications
            if not gold:
                self._forget_task_library()

    def _forget_task_library(self) -> None:
        """Drops the objects of all 30 tasks, 10 MB, which each load makes anew anyway."""
        getattr(self._server, "taskMaker_$eq")(None)

    @contextlib.contextmanager
    def _turn(self, loading: bool = False) -> Iterator[None]:
        """Makes it this simulator's turn; a load sets all shared state itself."""
        own = self._alive()
        with own.lock, own.calling():
            previous = own.current
            if previous is not self:
                if previous is not None:
                    previous._state = own.save(previous._simplifications)
                if self._state is not None and not loading:
                    own.restore(self._state)
                own.current = self
            yield
