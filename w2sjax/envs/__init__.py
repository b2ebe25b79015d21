"""Environments: the protocol, the built-in household, adapters, players and worker processes."""

from w2sjax.envs.base import ENVIRONMENTS, Env, Outcome, make_env
from w2sjax.envs.household import Household
from w2sjax.envs.players import PlayedEpisode, play

__all__ = ["ENVIRONMENTS", "Env", "Household", "Outcome", "PlayedEpisode", "make_env", "play"]
