"""The eight games of TextWorldExpress: parameters and their ranges, presets, limits, seeds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

_FLAG = (0, 1)
_ROOMS = (1, 11)


@dataclasses.dataclass(frozen=True)
class Game:
    """What is known of one game.

    Attributes:
      parameters: its parameters, each with the least and the greatest value that the package takes.
      presets: preset → (values of parameters that differ from the package's defaults, step limit).
    """

    parameters: Mapping[str, tuple[int, int]]
    presets: Mapping[str, tuple[Mapping[str, int], int]]


GAMES: Mapping[str, Game] = {
    "cookingworld": Game(
        {
            "numLocations": _ROOMS,
            "numDistractorItems": (0, 10),
            "numIngredients": (1, 5),
            "includeDoors": _FLAG,
            "limitInventorySize": _FLAG,
        },
        {
            "easy": (
                {
                    "numLocations": 1,
                    "numIngredients": 1,
                    "numDistractorItems": 0,
                    "includeDoors": 0,
                    "limitInventorySize": 0,
                },
                20,
            ),
            "medium": (
                {
                    "numLocations": 3,
                    "numIngredients": 2,
                    "numDistractorItems": 5,
                    "includeDoors": 0,
                    "limitInventorySize": 0,
                },
                30,
            ),
            "default": ({}, 50),
        },
    ),
    "twc": Game(
        {
            "numLocations": (1, 3),
            "numItemsToPutAway": (1, 4),
            "includeDoors": _FLAG,
            "limitInventorySize": _FLAG,
        },
        {
            "easy": ({"numLocations": 1, "numItemsToPutAway": 1}, 10),
            "medium": ({"numLocations": 2, "numItemsToPutAway": 2}, 20),
            "default": ({}, 40),
            "hard": ({"includeDoors": 1, "limitInventorySize": 1}, 50),
        },
    ),
    "coin": Game(
        {
            "numLocations": _ROOMS,
            "numDistractorItems": (0, 10),
            "includeDoors": _FLAG,
            "limitInventorySize": _FLAG,
        },
        {
            "easy": ({"numLocations": 5, "includeDoors": 0}, 15),
            "default": ({}, 50),
        },
    ),
    "mapreader": Game(
        {
            "numLocations": (1, 50),
            "maxDistanceApart": (1, 8),
            "maxDistractorItemsPerLocation": (0, 3),
            "includeDoors": _FLAG,
            "limitInventorySize": _FLAG,
        },
        {
            "easy": (
                {"numLocations": 3, "maxDistanceApart": 1, "maxDistractorItemsPerLocation": 0},
                14,
            ),
            "default": ({}, 30),
        },
    ),
    "arithmetic": Game({}, {"default": ({}, 10)}),
    "sorting": Game({}, {"default": ({}, 20)}),
    "simonsays": Game(
        {
            "gameLength": (1, 100),
            "numDistractors": (0, 5),
            "memorization": _FLAG,
            "verbose": _FLAG,
        },
        {
            "easy": ({"gameLength": 3, "numDistractors": 2}, 6),
            "default": ({}, 10),
            "memory": ({"memorization": 1, "verbose": 1}, 10),
        },
    ),
    "peckingorder": Game({}, {"default": ({}, 18)}),
}

SPLITS = ("pretrain", "demos", "train", "dev", "test")
FOLDS: Mapping[str, range] = {  # the package's own
    "train": range(0, 1000),
    "dev": range(10_000, 11_000),
    "test": range(20_000, 21_000),
}
_PRETRAIN_SEEDS = range(1000, 10_000)  # of no official fold; their games are drawn as in training
_DEMOS = 100


def split_seeds(split: str) -> list[int]:
    """The seeds of a split, ascending; the environment's text says how they are cut."""
    if split == "pretrain":
        return list(_PRETRAIN_SEEDS)
    if split in ("dev", "test"):
        return list(FOLDS[split])
    seeds = list(FOLDS["train"])
    random.Random(len(seeds)).shuffle(seeds)
    return sorted({"demos": seeds[:_DEMOS], "train": seeds[_DEMOS:]}[split])


def fold_of(seed: int) -> str | None:
    """The fold in which the game of a seed is drawn; None for a seed of no split."""
    if seed in _PRETRAIN_SEEDS:
        return "train"
    return next((fold for fold, seeds in FOLDS.items() if seed in seeds), None)


def parse_games(games: Sequence[str] | str) -> tuple[tuple[str, str], ...]:
    """(game, preset) pairs from texts "game" (its default preset) or "game:preset".

    Raises:
      ValueError: an unknown game or preset, or one named twice; the message names it.
    """
    if isinstance(games, str):
        games = tuple(GAMES) if games == "all" else [game.strip() for game in games.split(",")]
    pairs = []
    for text in games:
        game, _, preset = text.partition(":")
        if game not in GAMES:
            raise ValueError(f"games: unknown game {game!r}; known: {', '.join(GAMES)}")
        preset = preset or "default"
        if preset not in GAMES[game].presets:
            known = ", ".join(GAMES[game].presets)
            raise ValueError(f"games: {game} has no preset {preset!r}; known: {known}")
        pairs.append((game, preset))
    if not pairs or len(set(pairs)) != len(pairs):
        raise ValueError(f"games: want different games or game:preset pairs, got {list(games)!r}")
    return tuple(pairs)


def check_parameters(
    parameters: Mapping[str, Mapping[str, int]] | None, games: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Game → parameter → value, checked against the games in use and the package's ranges.

    Raises:
      ValueError: a game that is not in use, a parameter that the game does not have, or a value out
        of its range; the message names it.
    """
    checked: dict[str, dict[str, int]] = {}
    for game, values in (parameters or {}).items():
        if game not in games:
            raise ValueError(f"parameters: {game!r} is not among the games: {', '.join(games)}")
        ranges = GAMES[game].parameters
        for name, value in values.items():
            if name not in ranges:
                known = ", ".join(ranges) or "none"
                raise ValueError(f"parameters: {game} has no parameter {name!r}; it has: {known}")
            low, high = ranges[name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not low <= value <= high:
                raise ValueError(
                    f"parameters: {game}.{name}: want a whole number from {low} to {high}, "
                    f"got {value!r}"
                )
        checked[game] = dict(values)
    return checked


def parameter_text(game: str, preset: str, overrides: Mapping[str, int]) -> str:
    """A preset's parameters, some of them overridden, as the package reads them."""
    values = {**GAMES[game].presets[preset][0], **overrides}
    return ",".join(f"{name}={value}" for name, value in sorted(values.items()))
