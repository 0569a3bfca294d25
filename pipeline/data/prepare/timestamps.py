"""Reads times of any notation as SQL: Unix times in any unit, dates and times as texts, 20240131 and its finer forms, Excel's days.

The notation of a column is decided by a look at its values; a value that does not fit is an error or, where it fits but cannot be
meant, such as the year 9999, a loss that is counted.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.prepare.database import Database, quoted
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
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%g", " %I:%M %p", " %I:%M:%S %p")
DATES = {  # %y before %Y, which reads 24 as the year 24
    "dates, the month first": ("%m/%d/%y", "%m/%d/%Y", "%m-%d-%Y", "%m.%d.%Y"),
    "dates, the day first": ("%d/%m/%y", "%d.%m.%y", "%d/%m/%Y", "%d-%m-%Y", "%d.%m.%Y"),
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
    zone = (
        rf"regexp_replace(regexp_replace({x}, '\s*\(?[A-Z]{{3,4}}\)?$', case when regexp_matches({x}, '[+-]\d\d:?\d\d') then '' else "
        rf"'Z' end), ',(\d+)', '.\1')"
    )
    text = f"case when regexp_matches({x}, '(UTC|GMT)\\)?$') then {zone} else {x} end"
    text = f"regexp_replace({text}, '\\s+([+-]\\d\\d:?\\d\\d)$', '\\1')"
    return f"case when regexp_matches({x}, '^\\d{{4}}[-/]') then epoch_us(try_cast({text} as timestamptz)) end"


def _patterns(x: str, dates: tuple[str, ...]) -> str:
    formats = [
        f"{date}{sign}{clock.lstrip()}" if clock else date
        for date in dates
        for clock in CLOCKS
        for sign in ((" ", ", ") if clock else ("",))
    ]
    bare = f"regexp_replace(regexp_replace({x}, '\\s*(UTC|GMT|Z|\\+0000|\\+00:00)$', ''), '\\s+', ' ', 'g')"
    return f"epoch_us(try_strptime({bare}, [{', '.join(map(quoted, formats))}]))"


FAMILIES = {"ISO 8601": _iso} | {family: (lambda x, dates=dates: _patterns(x, dates)) for family, dates in DATES.items()}  # type: ignore[misc]
FAMILIES["in a notation of its own"] = lambda x: (
    f"epoch_us(try_strptime(regexp_replace({x}, '\\s*(UTC|GMT|Z|\\+0000)', ''), [{', '.join(map(quoted, OTHERS))}]))"
)


def find_clock(data: Database, source: Source, column: str, time_format: str | None) -> Clock:
    """Decides how a column is read, from the sample; a column of month and day in doubt, from all rows. Raises `UserError` (2, 3)."""
    kind = source.kinds.get(column, "text")
    raw = source.ref(column)
    if kind == "time" and time_format is None:
        return Clock(raw, 10**6, "timestamps", days=_whole_days(data, source, column))
    if kind in ("binary", "decimal", "nested", "other", "boolean"):
        raise UserError(
            f"column `{column}` has the wrong type, {source.arrow_type(column)} ({source.path}); give seconds or ISO 8601", DATA
        )
    x = f"cell(cast({raw} as varchar))"
    if time_format is not None:
        return _given(x, time_format)
    sampled = f"(select cell({source.sampled(column)}) x from {source.label}_sample)"
    number = "(try_cast(x as double) is not null and not regexp_matches(x, '[_a-df-zA-DF-Z]'))"
    count, numbers, fractions, length = data.one(
        f"select count(x), count(*) filter ({number}), count(*) filter ({number} and try_cast(x as double) <> floor(try_cast(x as "
        f"double))), "
        f"median(length(split_part(x, '.', 1))) from {sampled}"
    )
    if kind in ("integer", "float", "null") or numbers * 2 >= count:
        whole = raw if kind == "integer" else f"try_cast({raw} as double)" if kind == "float" else f"try_cast({x} as double)"
        days = not fractions and length == 8
        if fractions:
            return Clock(f"try_cast(round({whole} * 1000) as bigint)", 0, "numbers", scale=1000)
        exact = f"try_cast({whole} as bigint)" if kind in ("integer", "float") else f"try_cast({x} as bigint)"
        return Clock(exact, 0, "numbers", days=days)
    parsed = {family: sql("x") for family, sql in FAMILIES.items()}
    counts = data.one(f"select {', '.join(f'count({sql})' for sql in parsed.values())} from {sampled}")
    best = max(parsed, key=lambda family: counts[list(parsed).index(family)])
    if best in ("dates, the month first", "dates, the day first"):
        best = _month_or_day(data, source, column, x)
    days = data.one(f"select bool_and({parsed[best]} % 86400000000 = 0) from {sampled}")[0]
    return Clock(FAMILIES[best](x), 10**6, f"in {best}" if best == "ISO 8601" else best, days=bool(days))


def _whole_days(data: Database, source: Source, column: str) -> bool:
    return bool(data.one(f"select bool_and(try_cast({source.sampled(column)} as bigint) % 86400000000 = 0) from {source.label}_sample")[0])


def _given(x: str, time_format: str) -> Clock:
    """Reads times as --time-format says."""
    if "%" in time_format:
        return Clock(f"epoch_us(try_strptime({x}, {quoted(time_format)}))", 10**6, f"in the format {time_format}", given=True)
    if time_format not in NAMED_UNITS:
        known = ", ".join(NAMED_UNITS)
        raise UserError(f"--time-format {time_format} (command line); give {known}, or a pattern such as '%d/%m/%Y %H:%M'", USAGE)
    return Clock(
        f"try_cast(round({NAMED_UNITS[time_format].format(x=f'try_cast({x} as double)')}) as bigint)",
        10**3,
        f"in {time_format}",
        given=True,
    )


def _month_or_day(data: Database, source: Source, column: str, x: str) -> str:
    """Says whether the month or the day comes first in 03/04/2024, from all rows."""
    source.load("doubtful", {"x": x})
    month, day, same, example = data.one(
        f"select count(m), count(d), count(*) filter (m = d), min(x) filter (m <> d) from "
        f"(select x, {FAMILIES['dates, the month first']('x')} m, {FAMILIES['dates, the day first']('x')} d from doubtful)"
    )
    if month == day and same < month:
        fault = f"`{column}` {example!r} may begin with the day or with the month ({source.path})"
        raise UserError(f"{fault}; say which with --time-format, such as --time-format '%d/%m/%Y %H:%M'", DATA)
    return "dates, the month first" if month >= day else "dates, the day first"


def shown(seconds: float) -> str:
    """Formats Unix seconds as a date."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.6g} s"


def settle_unit(data: Database, table: str, column: str, clock: Clock, source: Source, theirs: str) -> tuple[str, int, str]:
    """Returns SQL of the times of a loaded column, their unit in ticks a second, and how they were read. Raises `UserError` (3)."""
    if clock.unit:
        return column, clock.unit, clock.notation
    median, count = data.one(f"select quantile_disc({column}, 0.5), count({column}) from {table}")
    if not count:
        return column, clock.scale, "numbers"
    median //= clock.scale
    pattern = DIGITS.get(len(str(median)))
    begins = f"{median:d}".ljust(6, "0")
    if pattern and clock.scale == 1 and 1990 <= int(begins[:4]) <= 2100 and 1 <= int(begins[4:6]) <= 12:
        parsed = f"try_strptime(cast({column} as varchar), {quoted(pattern)})"
        share = data.one(f"select avg(coalesce(year({parsed}) between 1990 and 2100, false)::int) from {table} where {column} is not null")[
            0
        ]
        if share > 1 - FEW:
            return f"epoch_us({parsed})", 10**6, f"days, as {median}" if len(str(median)) == 8 else f"dates and times, as {median}"
    if TICKS[0] < median < TICKS[1] and clock.scale == 1:
        return f"({column} - {TICKS_1970})", 10**7, "in ticks of .NET"
    unit = next((unit for unit in UNITS if abs(median) < LARGEST_SECOND * unit), 10**9)
    for other in UNITS:
        if other != unit:
            low, high = (seconds * other * clock.scale for seconds in (EARLIEST, time.time() + AHEAD))
            fits = f"{column} between {int(low)} and {int(high)}"
            mine = f"{column} between {int(EARLIEST * unit * clock.scale)} and {int((time.time() + AHEAD) * unit * clock.scale)}"
            row = data.one(f"select min(rowid) from {table} where {fits} and not {mine}")[0]
            if row is not None and EARLIEST * unit <= median:
                fault = f"times are partly in {UNITS[unit]}, partly in {'a coarser' if other < unit else 'a finer'} unit"
                raise UserError(f"{fault}, `{theirs}` ({source.where(row)}); use one unit", DATA)
    return column, unit * clock.scale, f"in {UNITS[unit]}"
