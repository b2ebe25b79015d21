"""The fields of a foreign record: taken one by one, so that what was not used can be told."""

from __future__ import annotations

import math
from typing import Any

from w2sjax.sampling.exchange.records import Record


class RefusedError(Exception):
    """A record that cannot be converted: the field, "" for the record as a whole, and why."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


class Fields:
    """The fields of a record, those of `meta` with a dot, and which of them were used.

    Attributes:
      record: the record.
      unused_in_messages: names of fields of messages that were not used.

    Raises:
      RefusedError: it is no object, or could not be read.
    """

    def __init__(self, record: Record):
        if record.error:
            raise RefusedError("", record.error)
        if not isinstance(record.value, dict):
            raise RefusedError("", f"wanted a JSON object, got {shown(record.value)}")
        self.record = record
        self._values = dict(record.value)
        meta = self._values.pop("meta", None)
        if isinstance(meta, dict):
            self._values |= {f"meta.{name}": value for name, value in meta.items()}
        elif meta is not None:
            raise RefusedError("meta", f"wanted an object, got {shown(meta)}")
        self._used: set[str] = set()
        self.unused_in_messages: set[str] = set()

    def take(self, field: str, kind: type | tuple[type, ...] = object, wanted: str = "") -> Any:
        """The field's value, marked as used; None where it is missing or null."""
        value = self._values.get(field)
        self._used.add(field)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, str)))
        ):
            raise RefusedError(field, f"wanted {wanted}, got {shown(value)}")
        return value

    def names(self) -> str:
        """All fields that are there, for a message."""
        return ", ".join(sorted(self._values)) or "none"

    def unused(self) -> set[str]:
        """Names of fields that have a value and were not taken."""
        left = {name for name, v in self._values.items() if v is not None} - self._used
        return left | self.unused_in_messages


def number(value: Any, where: str) -> float:
    """A finite number; true and false are 1 and 0."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RefusedError(where, f"wanted a number, got {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
