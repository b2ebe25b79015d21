"""Gymnasium environments as others write them, for the tests of the bridge."""

import gymnasium
from gymnasium import spaces


class Guess(gymnasium.Env):
    """A number from 1 to 9 is to be guessed; each wrong guess costs a point of ten."""

    def __init__(self, *, bad=""):
        text = spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyz 0123456789.?")
        self.action_space = spaces.Text(1, charset="0123456789")
        self.observation_space = text if bad != "dict" else spaces.Dict({"text": text})
        if bad == "discrete":
            self.action_space = spaces.Discrete(9)
        self._bad = bad

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._number = int(self.np_random.integers(1, 10))
        self._points = 10.0
        return self._said("guess a number"), self._info(False)

    def step(self, action):
        guess = int(action)
        won = guess == self._number
        self._points -= not won
        word = "right" if won else "higher" if guess < self._number else "lower"
        reward = self._points if won else 0.0
        return self._said(word), reward, won, False, self._info(won)

    def _said(self, text):
        if self._bad == "bytes":
            return text.encode()
        return {"text": text} if self._bad == "dict" else text

    def _info(self, won):
        points = "many" if self._bad == "points" else self._points
        return {
            "points": points,
            "won": won,
            "legal": [str(n) for n in range(9, 0, -1)],
            "best": str(self._number),
        }


def no_environment():
    return object()


gymnasium.register("Guess-v0", entry_point="text_gym_envs:Guess", max_episode_steps=5)
