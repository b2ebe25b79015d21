"""Values on trajectory trees: backups in closed form, Monte-Carlo tree search, best paths; where to
begin the next rollouts.
"""

from w2sjax.search.backup import backup_max, backup_mean, backup_soft
from w2sjax.search.mcts import SearchResult, run_mcts
from w2sjax.search.paths import BestPath, best_path
from w2sjax.search.priors import step_priors
from w2sjax.search.starts import choose_starts

__all__ = [
    "BestPath",
    "SearchResult",
    "backup_max",
    "backup_mean",
    "backup_soft",
    "best_path",
    "choose_starts",
    "run_mcts",
    "step_priors",
]
