"""Environments: the protocol, the built-in household, adapters, players and worker processes."""

from w2sjax.envs.base import ENVIRONMENTS, Env, Outcome, make_env
from w2sjax.envs.household import Household
from w2sjax.envs.players import PlayedEpisode, play
from w2sjax.envs.pool import EnvFailure, EnvPool, PlayRequest, Reset

__all__ = [
    "ENVIRONMENTS",
    "Env",
    "EnvFailure",
    "EnvPool",
    "Household",
    "Outcome",
    "PlayRequest",
    "PlayedEpisode",
    "Reset",
    "make_env",
    "play",
]
