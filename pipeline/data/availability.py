"""Reads when items may be recommended: the columns `available_from` and `available_until` of items.parquet.

An item is a candidate from `available_from` on and before `available_until`. An empty cell sets no limit. Without a value in
either column every item is always a candidate, and nothing is computed.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import DATA, UserError
from pipeline.data.clock import is_clock, read_clock

AVAILABLE_FROM, AVAILABLE_UNTIL = COLUMNS = "available_from", "available_until"
ALWAYS, NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max  # seconds


class Availability(NamedTuple):
    """The time limits of N items."""

    begin: np.ndarray  # (N,) int64 Unix seconds: from then on an item may be recommended; ALWAYS: no limit
    end: np.ndarray  # (N,) int64 Unix seconds: from then on it may not; NEVER: no limit

    @classmethod
    def unlimited(cls, items: int) -> "Availability":
        """Returns limits that exclude nothing, for `items` items."""
        return cls(np.full(items, ALWAYS), np.full(items, NEVER))

    def at(self, time: int) -> np.ndarray:
        """Returns (N,) bool: whether each item may be recommended at `time`, Unix seconds."""
        open_: np.ndarray = (self.begin <= time) & (time < self.end)
        return open_

    def without(self, excluded: np.ndarray) -> "Availability":
        """Returns limits in which the items `excluded` (N,) bool may never be recommended."""
        return Availability(np.where(excluded, NEVER, self.begin), self.end)

    def take(self, rows: np.ndarray) -> "Availability":
        """Returns the limits of the items `rows`."""
        return Availability(self.begin[rows], self.end[rows])

    def columns(self) -> dict[str, pa.Array]:
        """Returns columns of timestamps, empty where there is no limit.

        Not plain numbers: seconds above `MILLISECONDS`, such as those of the year 9999, would be read as milliseconds.
        """
        return {
            AVAILABLE_FROM: pa.array(self.begin, pa.timestamp("s"), mask=self.begin == ALWAYS),
            AVAILABLE_UNTIL: pa.array(self.end, pa.timestamp("s"), mask=self.end == NEVER),
        }


def read_availability(path: Path, table: pa.Table) -> Availability | None:
    """Reads the limits from a table of items; None where it has none. Raises `UserError` (3)."""
    if not set(COLUMNS) & set(table.column_names):
        return None
    begin, end = (
        _seconds(path, table[name], name, missing) if name in table.column_names else np.full(len(table), missing)
        for name, missing in ((AVAILABLE_FROM, ALWAYS), (AVAILABLE_UNTIL, NEVER))
    )
    if (reversed_ := np.flatnonzero(begin >= end)).size:
        raise UserError(
            f"an item ends before it begins ({path} row {reversed_[0]}); {AVAILABLE_FROM} must be before {AVAILABLE_UNTIL}", DATA
        )
    unlimited = (begin == ALWAYS).all() and (end == NEVER).all()
    return None if unlimited else Availability(begin, end)


def _seconds(path: Path, column: pa.ChunkedArray, name: str, missing: int) -> np.ndarray:
    """Reads a column as (N,) int64 Unix seconds; `missing` for an empty cell."""
    seconds = np.full(len(column), missing)
    filled: np.ndarray = (
        pc.is_valid(column).to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else pc.is_valid(column).to_numpy()
    )
    if not filled.any():
        return seconds
    if not is_clock(column.type):
        raise UserError(f"column `{name}` has the wrong type, {column.type} ({path}); give timestamps, or seconds as integers", DATA)
    ticks, unit = read_clock(path, column.filter(pa.array(filled)), name, np.flatnonzero(filled))
    seconds[filled] = ticks // unit
    return seconds
