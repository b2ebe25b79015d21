"""Sampling: how a policy's answers are drawn, how it plays environments, and episodes on disk."""

from w2sjax.sampling.choose import collect_choosing
from w2sjax.sampling.collect import NOT_DETERMINISTIC, CollectStats, EpisodeRequest, collect
from w2sjax.sampling.demonstrations import play_episodes
from w2sjax.sampling.sampler import (
    DecodeWork,
    Sampler,
    SamplerSettings,
    SlotState,
    TurnResult,
    make_sampler,
)
from w2sjax.sampling.store import (
    TrajectoryFileError,
    TrajectoryWriter,
    dump_trajectories,
    read_trajectories,
)

__all__ = [
    "NOT_DETERMINISTIC",
    "CollectStats",
    "DecodeWork",
    "EpisodeRequest",
    "Sampler",
    "SamplerSettings",
    "SlotState",
    "TrajectoryFileError",
    "TrajectoryWriter",
    "TurnResult",
    "collect",
    "collect_choosing",
    "dump_trajectories",
    "make_sampler",
    "play_episodes",
    "read_trajectories",
]
