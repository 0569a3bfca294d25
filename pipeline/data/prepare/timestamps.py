"""Reads times of a foreign log as int64 in one unit: seconds or finer, days written as 20240131, or ISO 8601."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import is_text
from pipeline.data.prepare.tables import SourceTable

UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
LARGEST_SECOND = 10**11  # the year 5138; times above are in a finer unit
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def codes(values: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Returns (E,) the index of each value in the list of distinct values, -1 for null, and that list."""
    encoded = values.combine_chunks().dictionary_encode()
    chunk = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    return chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), chunk.dictionary.to_pylist()


def is_number(value: object) -> bool:
    """Returns whether a cell is empty or a finite number."""
    try:
        return value is None or not str(value).strip() or math.isfinite(float(str(value)))
    except ValueError:
        return False


def read_times(source: SourceTable, name: str, note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """Returns times (E,) int64, their units in a second, and where there is a time (E,). Raises `UserError` (3)."""
    values = source.column(name)
    kind = values.type
    if pa.types.is_date(kind):
        values, kind = values.cast(pa.timestamp("s")), pa.timestamp("s")
    known = ~np.asarray(values.is_null().to_numpy())
    if pa.types.is_timestamp(kind):
        unit = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        return values.cast(pa.int64()).fill_null(0).to_numpy(), unit, known
    if pa.types.is_integer(kind):
        clock = values.cast(pa.int64(), safe=False).fill_null(0).to_numpy()
    elif pa.types.is_floating(kind):
        known &= ~np.isnan(values.to_numpy())
        return _float_times(source, np.where(known, values.fill_null(0).to_numpy(), 0), known, note)
    elif is_text(kind) or pa.types.is_null(kind):
        return _text_times(source, name, note)
    else:
        raise UserError(f"column `{name}` has the wrong type, {kind} ({source.path}); give seconds or ISO 8601", DATA)
    return _whole_times(source, clock, known, note)


def _whole_times(
    source: SourceTable, clock: np.ndarray, known: np.ndarray, note: Callable[[str], None]
) -> tuple[np.ndarray, int, np.ndarray]:
    """Reads whole numbers: seconds or a finer unit, or, if all are such days, 20240131."""
    times = clock[known]
    year, month, day = times // 10_000, times // 100 % 100, times % 100
    if len(times) and ((year >= 1990) & (year <= 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all():
        note(f"{source.path}: times are days, as {times[0]}")
        months = (clock // 10_000 - 1970) * 12 + clock // 100 % 100 - 1
        days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + clock % 100 - 1
        return np.where(known, days * 86_400, 0), 1, known
    return clock, _unit(source, clock, known, note), known


def _float_times(
    source: SourceTable, clock: np.ndarray, known: np.ndarray, note: Callable[[str], None]
) -> tuple[np.ndarray, int, np.ndarray]:
    infinite = known & ~np.isfinite(clock)
    if infinite.any():
        raise UserError(f"a time is not finite ({source.where(int(np.argmax(infinite)))}); fix it, or leave the cell empty", DATA)
    if (clock == np.floor(clock)).all():
        return _whole_times(source, clock.astype(np.int64), known, note)
    unit = _unit(source, clock, known, note)
    if unit == 1:
        return np.round(clock * 1000).astype(np.int64), 1000, known  # fractions of a second order events too
    return np.floor(clock).astype(np.int64), unit, known


def _text_times(source: SourceTable, name: str, note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """Reads texts: numbers, or dates and times in ISO 8601 (UTC if they name no zone)."""
    code, texts = codes(source.ids(name))
    known = code >= 0
    numbers = [is_number(text) for text in texts]
    if sum(numbers) * 2 > len(texts) or not texts:
        if not all(numbers):
            i = numbers.index(False)
            raise UserError(f"`{name}` {texts[i][:40]!r} is not a number ({source.where(int(np.argmax(code == i)))}); give one unit", DATA)
        clock = np.array([float(text) for text in texts] or [0.0])
        return _float_times(source, np.where(known, clock[code], 0), known, note)
    micros = np.zeros(len(texts), np.int64)
    for i, text in enumerate(texts):
        try:
            moment = datetime.fromisoformat(text)
            micros[i] = ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)
        except ValueError:
            row = int(np.argmax(code == i))
            raise UserError(f"`{name}` {text[:40]!r} is not a time ({source.where(row)}); give seconds or ISO 8601", DATA) from None
    return np.where(known, micros[code], 0), 10**6, known


def _unit(source: SourceTable, clock: np.ndarray, known: np.ndarray, note: Callable[[str], None]) -> int:
    largest = clock[known].max(initial=0)
    unit = next((unit for unit in UNITS if largest < LARGEST_SECOND * unit), 10**9)
    smallest = clock[known].min(initial=largest)
    if unit > 1 and smallest < LARGEST_SECOND * unit // 10**4:  # 1970-04 in this unit: more likely a time in a coarser one
        row = int(np.argmax(known & (clock == smallest)))
        raise UserError(f"times are partly in {UNITS[unit]}, partly in a coarser unit ({source.where(row)}); use one unit", DATA)
    if unit > 1:
        note(f"{source.path}: times are in {UNITS[unit]}, written in seconds")
    return unit
