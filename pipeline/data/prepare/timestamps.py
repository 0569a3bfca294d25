"""Reads times of any notation as SQL: Unix times in any unit, dates and times as texts, 20240131 and its finer forms, Excel's days.

The notation of a column is decided by a look at its values; a value that does not fit is an error or, where it fits but cannot be
meant, such as the year 9999, a loss that is counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.prepare.database import quoted
from pipeline.data.prepare.tables import Source

UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
LARGEST_SECOND = 10**11  # the year 5138; times above are in a finer unit
EARLIEST = 631_152_000  # 1990
AHEAD = 366 * 86_400  # a time this far in the future is no time of an event
FEW = 0.1  # share of implausible times that are dropped; more are refused
NAMED_UNITS = {  # --time-format: SQL of milliseconds
    "seconds": "{x} * 1e3",
    "milliseconds": "{x}",
    "microseconds": "{x} / 1e3",
    "nanoseconds": "{x} / 1e6",
    "minutes": "{x} * 6e4",
    "hours": "{x} * 36e5",
    "days": "{x} * 864e5",
    "excel": "round(({x} - 25569) * 86400) * 1000",  # days since 1899-12-30
}
DIGITS = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S", 17: "%Y%m%d%H%M%S%g"}  # 20240131 and finer
TICKS_1970 = 621_355_968 * 10**9  # ticks of 100 ns since the year 1, on which .NET counts
TICKS = TICKS_1970 + 10**7 * 86_400 * 7_300, TICKS_1970 + 10**7 * 86_400 * 47_000  # 1990 to 2098; as nanoseconds these are of 1990
CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%g", "%I:%M %p", "%I:%M:%S %p")
MONTH_FIRST, DAY_FIRST = "dates, the month first", "dates, the day first"
DATES = {  # %y before %Y, which reads 24 as the year 24
    MONTH_FIRST: ("%m/%d/%y", "%m/%d/%Y", "%m-%d-%Y", "%m.%d.%Y"),
    DAY_FIRST: ("%d/%m/%y", "%d.%m.%y", "%d/%m/%Y", "%d-%m-%Y", "%d.%m.%Y"),
    "dates with the month in letters": (
        *("%d-%b-%y", "%d %b %Y", "%d-%b-%Y", "%d/%b/%Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%a, %d %b %Y"),
    ),
}
OTHERS = (
    *("%Y%m%dT%H%M%S", "%Y.%m.%d %H:%M:%S", "%Y.%m.%d", "%Y-%m-%d %I:%M:%S %p", "%Y-%m-%d %I:%M %p"),
    *("%a %b %d %H:%M:%S %Y", "%d/%b/%Y:%H:%M:%S"),
)


@dataclass
class Clock:
    """How a column's times are read: `sql` gives them as BIGINT, in `unit` ticks a second; unit 0: to be seen from all values."""

    sql: str
    unit: int
    notation: str
    days: bool = False  # the times are days
    scale: int = 1  # with unit 0: the values are so many times those in the file
    given: bool = False  # by --time-format


def _iso(x: str) -> str:
    """Returns SQL of the microseconds of an ISO 8601 text, with a zone after the time in any form: Z, +0200, UTC, `+0000 UTC`."""
    zone = rf"case when regexp_matches({x}, '[+-]\d\d:?\d\d') then '' else 'Z' end"
    named = rf"regexp_replace(regexp_replace({x}, '\s*\(?[A-Z]{{3,4}}\)?$', {zone}), ',(\d+)', '.\1')"
    text = rf"regexp_replace(case when regexp_matches({x}, '(UTC|GMT)\)?$') then {named} else {x} end, '\s+([+-]\d\d:?\d\d)$', '\1')"
    return rf"case when regexp_matches({x}, '^\d{{4}}[-/]') then epoch_us(try_cast({text} as timestamptz)) end"


def _patterns(x: str, dates: tuple[str, ...]) -> str:
    formats = [f"{date}{sign}{clock}" for date in dates for clock in CLOCKS for sign in (" ", ", ")] + [*dates]
    bare = rf"regexp_replace(regexp_replace({x}, '\s*(UTC|GMT|Z|\+0000|\+00:00)$', ''), '\s+', ' ', 'g')"
    return f"epoch_us(try_strptime({bare}, [{', '.join(map(quoted, formats))}]))"


def _others(x: str) -> str:
    return rf"epoch_us(try_strptime(regexp_replace({x}, '\s*(UTC|GMT|Z|\+0000)', ''), [{', '.join(map(quoted, OTHERS))}]))"


FAMILIES: dict[str, Callable[[str], str]] = {
    "ISO 8601": _iso,
    **{family: partial(_patterns, dates=dates) for family, dates in DATES.items()},
    "in a notation of its own": _others,
}


def find_clock(source: Source, column: str, time_format: str | None) -> Clock:
    """Decides how a column is read, from the sample; a column of month and day in doubt, from all rows. Raises `UserError` (2, 3)."""
    kind, raw = source.kinds.get(column, "text"), source.ref(column)
    x, sample = source.text(column), f"from (select cell({raw}) x from {source.label}_sample)"
    days = "bool_and({} % 86400000000 = 0)"
    if kind == "time" and time_format is None:
        return Clock(raw, 10**6, "timestamps", days=bool(source.data.one(f"select {days.format('try_cast(x as bigint)')} {sample}")[0]))
    if kind in ("binary", "decimal", "nested", "other", "boolean"):
        fault = f"column `{column}` has the wrong type, {source.arrow_type(column)} ({source.path}); give seconds or ISO 8601"
        raise UserError(fault, DATA)
    if time_format is not None:
        return _given(x, time_format)
    number = "(try_cast(x as double) is not null and not regexp_matches(x, '[_a-df-zA-DF-Z]'))"
    fraction = f"{number} and try_cast(x as double) <> floor(try_cast(x as double))"
    count, numbers, fractions, length = source.data.one(
        f"select count(x), count(*) filter ({number}), count(*) filter ({fraction}), median(length(split_part(x, '.', 1))) {sample}"
    )
    if kind in ("integer", "float", "null") or numbers * 2 >= count:
        value = x if kind in ("text", "null") else raw
        if fractions:
            return Clock(f"try_cast(round(try_cast({value} as double) * 1000) as bigint)", 0, "numbers", scale=1000)
        return Clock(f"try_cast({value} as bigint)", 0, "numbers", days=length == 8)
    parsed = {family: sql("x") for family, sql in FAMILIES.items()}
    counts = dict(zip(parsed, source.data.one(f"select {', '.join(f'count({sql})' for sql in parsed.values())} {sample}"), strict=True))
    family = max(parsed, key=lambda family: int(counts[family]))
    if family in (MONTH_FIRST, DAY_FIRST):
        family = _month_or_day(source, column, x)
    whole = bool(source.data.one(f"select {days.format(parsed[family])} {sample}")[0])
    return Clock(FAMILIES[family](x), 10**6, f"in {family}" if family == "ISO 8601" else family, days=whole)


def _given(x: str, time_format: str) -> Clock:
    """Reads times as --time-format says."""
    if "%" in time_format:
        return Clock(f"epoch_us(try_strptime({x}, {quoted(time_format)}))", 10**6, f"in the format {time_format}", given=True)
    if time_format not in NAMED_UNITS:
        known = ", ".join(NAMED_UNITS)
        raise UserError(f"--time-format {time_format} (command line); give {known}, or a pattern such as '%d/%m/%Y %H:%M'", USAGE)
    milliseconds = NAMED_UNITS[time_format].format(x=f"try_cast({x} as double)")
    return Clock(f"try_cast(round({milliseconds}) as bigint)", 10**3, f"in {time_format}", given=True)


def _month_or_day(source: Source, column: str, x: str) -> str:
    """Says whether the month or the day comes first in 03/04/2024, from all rows."""
    source.load("doubtful", {"x": x})
    both = f"(select x, {FAMILIES[MONTH_FIRST]('x')} m, {FAMILIES[DAY_FIRST]('x')} d from doubtful)"
    month, day, same, example = source.data.one(f"select count(m), count(d), count(*) filter (m = d), min(x) filter (m <> d) from {both}")
    if month == day and same < month:
        fault = f"`{column}` {example!r} may begin with the day or with the month ({source.path})"
        raise UserError(f"{fault}; say which with --time-format, such as --time-format '%d/%m/%Y %H:%M'", DATA)
    return MONTH_FIRST if month >= day else DAY_FIRST


def shown(seconds: float) -> str:
    """Formats Unix seconds as a date."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.6g} s"


def settle_unit(source: Source, table: str, column: str, clock: Clock, theirs: str) -> tuple[str, int, str]:
    """Returns SQL of the times of a loaded column, their unit in ticks a second, and how they were read. Raises `UserError` (3)."""
    if clock.unit:
        return column, clock.unit, clock.notation
    data, scale = source.data, clock.scale
    median = data.one(f"select quantile_disc({column}, 0.5) from {table}")[0]
    if median is None:
        return column, scale, "numbers"
    median //= scale
    pattern, begins = DIGITS.get(len(str(median))), f"{median:d}".ljust(6, "0")
    if pattern and scale == 1 and 1990 <= int(begins[:4]) <= 2100 and 1 <= int(begins[4:6]) <= 12:
        parsed = f"try_strptime(cast({column} as varchar), {quoted(pattern)})"
        fits = f"coalesce(year({parsed}) between 1990 and 2100, false)"
        if data.one(f"select avg({fits}::int) from {table} where {column} is not null")[0] > 1 - FEW:
            return f"epoch_us({parsed})", 10**6, f"{'days' if pattern == '%Y%m%d' else 'dates and times'}, as {median}"
    if TICKS[0] < median < TICKS[1] and scale == 1:
        return f"({column} - {TICKS_1970})", 10**7, "in ticks of .NET"

    def within(unit: int) -> str:
        return f"{column} between {int(EARLIEST * unit * scale)} and {int((time.time() + AHEAD) * unit * scale)}"

    unit = next((unit for unit in UNITS if abs(median) < LARGEST_SECOND * unit), 10**9)
    for other in [other for other in UNITS if other != unit and median >= EARLIEST * unit]:
        row = data.one(f"select min(rowid) from {table} where {within(other)} and not {within(unit)}")[0]
        if row is not None:
            fault = f"times are partly in {UNITS[unit]}, partly in {'a coarser' if other < unit else 'a finer'} unit"
            raise UserError(f"{fault}, `{theirs}` ({source.where(row)}); use one unit", DATA)
    return column, unit * scale, f"in {UNITS[unit]}"
