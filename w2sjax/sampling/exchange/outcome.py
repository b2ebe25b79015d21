"""How a foreign episode ended: its score, and whether that was a success."""

from __future__ import annotations

import collections

from w2sjax.sampling.exchange.fields import Fields, RefusedError, number
from w2sjax.types import Status

SUCCESS_FROM = ("auto", "field", "score")

_REASONS = {  # ETO's terminate_reason, where the episode was no success
    "max_steps": Status.STEP_LIMIT,
    "exceeding maximum input length": Status.TOKEN_LIMIT,
    "success": Status.FAILED,  # it says that the environment ended the episode
}
_SCORES = ("score", "reward", "meta.reward")


def read_outcome(
    fields: Fields,
    notes: collections.Counter[str],
    *,
    score_scale: float,
    clip_scores: bool,
    default_score: float | None,
    success_from: str,
    success_score: float,
) -> tuple[Status, float]:
    """Status and score; for the options see `imports.ImportOptions`.

    Args:
      fields: of the record.
      notes: what is worth telling is counted here.
    """
    score = _score(fields, notes, score_scale, clip_scores, default_score)
    status = fields.take("status", str, "a string")
    own = fields.take("success", bool, "true or false")
    ended = fields.take("meta.success", bool, "true or false")
    reason = fields.take("meta.terminate_reason", str, "a string")
    if status is not None:
        if status not in list(Status):
            raise RefusedError("status", f"wanted one of {', '.join(Status)}, got {status!r}")
        if own is not None and own != (status == Status.SUCCESS):
            raise RefusedError("success", f"is {own}, but status is {status!r}")
        return Status(status), score
    success = score >= success_score
    if success_from == "field":
        if (field := ended if own is None else own) is None:
            raise RefusedError("success", "is missing (success_from is 'field')")
        success = field
    elif success_from == "auto" and own is not None:
        success = own
    if success:
        return Status.SUCCESS, score
    if ended:
        notes["meta.success is true, but the score is no success"] += 1
    if reason is not None and reason not in _REASONS:
        notes[f"unknown meta.terminate_reason {reason[:60]!r}, taken for a failure"] += 1
    return _REASONS.get(reason or "", Status.FAILED), score


def _score(
    fields: Fields,
    notes: collections.Counter[str],
    scale: float,
    clip: bool,
    default: float | None,
) -> float:
    given = {name: value for name in _SCORES if (value := fields.take(name)) is not None}
    if not given:
        if default is None:
            raise RefusedError(
                "score", f"is missing, and so are {', '.join(_SCORES[1:])}; default_score gives one"
            )
        notes["without a score of their own (default_score)"] += 1
        return default
    numbers = {name: number(value, name) for name, value in given.items()}
    if len(set(numbers.values())) > 1:
        raise RefusedError(next(iter(numbers)), f"the record's scores differ: {numbers}")
    name, raw = next(iter(numbers.items()))
    score = raw / scale
    if not 0 <= score <= 1:
        if not clip:
            raise RefusedError(
                name, f"wanted a score in [0, 1], got {score:g}; clip_scores cuts it, score_scale "
                "divides it",
            )  # fmt: skip
        notes["scores cut to [0, 1]"] += 1
        score = min(1.0, max(0.0, score))
    return score
