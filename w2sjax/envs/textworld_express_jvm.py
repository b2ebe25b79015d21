"""TextWorldExpress's simulator in a JVM that all of a process's environment objects share.

Games live side by side in one JVM, but for sorting: there the package makes the things of a problem
once, and every game with that problem moves the same ones. A simulator whose sorting game was left
for another's therefore brings its game back by the same actions.
"""

from __future__ import annotations

import json
import threading
from typing import NamedTuple

from w2sjax.envs import jvm

DIRECTIONS = ("north", "south", "east", "west")
_AGENTS = {
    "ArithmeticGame": "ArithmeticGoldAgent",
    "CoinGame": "CoinGoldAgent",
    "CookingWorldGame": "CookingWorldGoldAgent",
    "MapReaderGame": "MapReaderGoldAgent",
    "PeckingOrderGame": "PeckingOrderGoldAgent",
    "SimonSaysGame": "SimonSaysGoldAgent",
    "SimonSaysMemoryGame": "SimonSaysMemoryGoldAgent",
    "SortingGame": "SortingGoldAgent",
    "TWCGame": "TWCGoldAgent",
}  # class of a game → class of the player that plays it to its end
_SHARING_THINGS = ("sorting",)
_WITH_ROOMS = ("CoinGame", "CookingWorldGame", "MapReaderGame", "TWCGame")


def check_packages() -> None:
    """Raises ImportError, saying what to install, where the game's packages are missing."""
    names = ("textworld_express", "py4j")
    jvm.check_packages("TextWorldExpress", names, "textworld_express")


class View(NamedTuple):
    """What the simulator says of the state after an action."""

    observation: str
    look: str
    inventory: str
    actions: tuple[str, ...]  # all that are valid, sorted
    score: float  # at most 1; below 0 where some games are lost
    success: bool
    failure: bool


class _Jvm(jvm.Jvm):
    """A running JVM with TextWorldExpress's jar."""

    title = "TextWorldExpress"

    def __init__(self, java: str, heap_mb: int):
        super().__init__(java, heap_mb)
        self.lock = threading.RLock()
        self.turn: Simulator | None = None  # whose game with shared things is as it left it

    def files(self) -> tuple[str, str]:
        import textworld_express.constants

        # The jar reads its tables of objects from its own folder.
        return textworld_express.constants.JAR_PATH, textworld_express.constants.BASEPATH


class Simulator:
    """One game at a time.

    Errors: a call raises RuntimeError where the JVM has died, ran out of memory or threw. The
    simulator is then of no more use; a new one starts a new JVM.

    Args:
      heap_mb: largest heap of the JVM, in MB, shared by all simulators of this process with the
      same value.
    """

    def __init__(self, heap_mb: int):
        check_packages()
        self._jvm: _Jvm | None = jvm.acquire(_Jvm, heap_mb)
        with self._jvm.calling():
            self._java = self._jvm.gateway.jvm
            self._server = self._java.textworldexpress.runtime.PythonInterface()
        self._loaded: tuple[str, str] | None = None  # game and parameters
        self._game: tuple[int, str] | None = None  # seed and fold
        self._actions: list[str] = []

    @property
    def pid(self) -> int:
        """Process id of the JVM."""
        return self._alive().process.pid

    @property
    def usable(self) -> bool:
        """Whether the simulator is open and its JVM runs."""
        return self._jvm is not None and self._jvm.running

    def start(self, game: str, parameters: str, seed: int, fold: str) -> View:
        """Starts a game.

        Args:
          game: its name in the package.
          parameters: "name=number" with commas between them; "" for the package's defaults.
          seed: of the game's world.
          fold: "train", "dev" or "test": some games draw from other objects in each.

        Raises:
          ValueError: the package refuses the game or its parameters.
        """
        own = self._alive()
        with own.lock, own.calling():
            own.answer_at_once()
            if self._loaded != (game, parameters):
                error = self._server.load(game, parameters)
                self._loaded = None if error else (game, parameters)
                if error:
                    raise ValueError(
                        f"TextWorldExpress refuses {game!r} with {parameters!r}: {error}"
                    )
            self._game = (seed, fold)
            self._actions = []
            self._note_turn()
            return _view(self._server.generateNewGameJSON(seed, fold, False))

    def step(self, action: str) -> View:
        """Performs an action (about 0.3 ms)."""
        own = self._alive()
        with own.lock, own.calling():
            self._take_turn()
            self._actions.append(action)
            return _view(self._server.stepJSON(action))

    def _note_turn(self) -> bool:
        """Says that shared things are now as this game has them; whether they were before."""
        if self._loaded is None or self._loaded[0] not in _SHARING_THINGS:
            return True
        before, self._jvm.turn = self._jvm.turn, self
        return before is self

    def _take_turn(self) -> None:
        if not self._note_turn():
            self._server.generateNewGameJSON(*self._game, False)
            for action in self._actions:
                self._server.stepJSON(action)

    def task_description(self) -> str:
        with self._alive().calling():
            return self._server.getTaskDescription()

    def gold_actions(self, seed: int) -> list[str]:
        """Lets the package's gold player play the game to its end, from its present state.

        The game is then over, or where the player gave up; some of the actions may be invalid. (The
        gold path that the package makes along with a game is the same player's from the start, but
        in twc and coin with other random choices in every process.)

        Args:
          seed: of the player's own choices.
        """
        own = self._alive()
        with own.lock, own.calling():
            self._take_turn()
            game = self._server.game()
            done_before = game.history().length()
            name = game.getClass().getSimpleName()
            agent = getattr(self._java.textworldexpress.goldagent, _AGENTS[name])(game)
            agent.mkGoldPath(self._java.scala.util.Random(seed))
            history = game.history()
            did = [history.apply(i).actionStr() for i in range(done_before, history.length())]
            self._actions += did
            return did

    def rooms(self) -> dict[str, dict[str, str]]:
        """Room → direction → room behind it, doors closed or not; empty for games in one room."""
        with self._alive().calling():
            game = self._server.game()
            if game.getClass().getSimpleName() not in _WITH_ROOMS:
                return {}
            exits: dict[str, dict[str, str]] = {}
            for room in game.locations():
                behind = exits[room.name()] = {}
                for direction in DIRECTIONS:
                    neighbour = getattr(room, f"location{direction.capitalize()}")()
                    if neighbour is not None:
                        behind[direction] = neighbour.name()
            return exits

    def close(self) -> None:
        """Lets go of the simulator; the last one out ends the JVM. May be called twice."""
        own, self._jvm = self._jvm, None
        if own is not None:
            with own.lock:
                own.turn = None if own.turn is self else own.turn
            self._server = self._java = None
            jvm.release(own)

    def _alive(self) -> _Jvm:
        if self._jvm is None:
            raise RuntimeError("this TextWorldExpress simulator is closed; make a new one")
        return self._jvm


def _view(text: str) -> View:
    said = json.loads(text)
    return View(
        observation=said["observation"],
        look=said["look"],
        inventory=said["inventory"],
        actions=tuple(sorted(set(said["validActions"]))),
        score=float(said["score"]),
        success=bool(said["tasksuccess"]),
        failure=bool(said["taskfailure"]),
    )
