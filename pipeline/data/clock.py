"""Reads columns of times: Arrow timestamps of any unit, or integers in seconds or milliseconds."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import DATA, UserError, note

PREPARE = "`tpad prepare` writes such a file"
MILLISECONDS = 10**11  # a timestamp above is not in seconds (that would be the year 5138) ...
MICROSECONDS = 10**14  # ... and one above this is not in milliseconds either
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_clock(kind: pa.DataType) -> bool:
    """Returns whether a column of this type can hold times."""
    return bool((pa.types.is_integer(kind) and kind != pa.uint64()) or pa.types.is_timestamp(kind))


def read_clock(path: Path, column: pa.ChunkedArray, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Reads the times of a column without gaps: (E,) int64 ticks, and the number of ticks in a second. Raises `UserError` (3).

    `rows` (E,): the row of each time in the file, if it is not its position.
    """
    row = pc.index(pc.is_null(column), True).as_py()
    if row >= 0:
        raise UserError(f"{name} is empty ({path} row {row}); every row needs one", DATA)
    ticks: np.ndarray = column.cast(pa.int64()).to_numpy().astype(np.int64)
    if pa.types.is_timestamp(column.type):
        return ticks, UNITS[column.type.unit]
    if not len(ticks) or ticks.max() < MILLISECONDS:
        return ticks, 1
    if ticks.max() >= MICROSECONDS:
        row = ticks.argmax() if rows is None else rows[ticks.argmax()]
        raise UserError(f"{name} is neither in seconds nor in milliseconds ({path} row {row}); {PREPARE}", DATA)
    if ticks.min() < MILLISECONDS // 10:  # 1970-04 in milliseconds: rather a time in seconds
        row = ticks.argmin() if rows is None else rows[ticks.argmin()]
        raise UserError(f"values of {name} are partly in seconds, partly in milliseconds ({path} row {row}); use one unit", DATA)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        note(f"note: values of {name} in {path} are read as milliseconds")
    return ticks, 1000
