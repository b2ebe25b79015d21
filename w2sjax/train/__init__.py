"""Training over plain functions: optimizers, the update, scoring, and the run."""

from w2sjax.train.loop import FitResult, fit
from w2sjax.train.optim import averaged_params, decay_mask, make_optimizer, make_schedule
from w2sjax.train.score import SequenceScorer, cached_scores, make_sequence_scorer
from w2sjax.train.state import TrainState, init_state
from w2sjax.train.step import TrainStep, make_train_step
from w2sjax.train.termination import TrainingInterrupted

__all__ = [
    "FitResult",
    "SequenceScorer",
    "TrainState",
    "TrainStep",
    "TrainingInterrupted",
    "averaged_params",
    "cached_scores",
    "decay_mask",
    "fit",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "make_sequence_scorer",
    "make_train_step",
]
