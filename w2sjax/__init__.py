"""w2sjax: from a weak agent's trajectories, successes and failures, to a stronger agent, in JAX.

Rooms, in the order of the data: `envs`, `chat`, `sampling`, `trees`, `search`, `targets`,
`batches`, `losses`, `models`, `parallel`, `train`, `checkpoints`, `evaluate`, `report`; `pipeline`
joins them.
"""

__version__ = "0.1.0"
