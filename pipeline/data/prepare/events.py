"""Reads a log of events into the table `log`, and settles what groups and orders them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import MAX_ID_BYTES
from pipeline.data.prepare.columns import NOT_IDS, Columns
from pipeline.data.prepare.database import BAD, Database, quoted
from pipeline.data.prepare.table_options import Report, TableOptions
from pipeline.data.prepare.timestamps import AHEAD, EARLIEST, FEW, LARGEST_SECOND, Clock, find_clock, settle_unit, shown

DEFAULT_GAP = 30 * 60.0  # seconds
CONTROL = r"[\x00-\x1f\x7f\x{80}-\x{9f}\x{2028}\x{2029}]"


@dataclass(frozen=True)
class SessionRules:
    """How sessions are cut and filtered."""

    gap: float | None = None  # longest pause in seconds inside a session; None: 30 minutes, and no limit in named sessions
    min_item_count: int = 1  # events of items with fewer events are dropped
    min_length: int = 2  # shortest session in events
    max_length: int = 0  # longest session in events, of which the last are kept; 0: no limit
    collapse: bool = False  # of equal neighbours, keep the first


@dataclass
class Events:
    """The table `log` (g: session, u: user, i: item, t: time, o: position) and how it is read."""

    data: Database
    columns: Columns
    say: Callable[[str], None]
    drop: Callable[[str, int], None]
    group: str = ""  # session_id or user_id
    clock: str = ""  # SQL of the time, in `unit` ticks a second; empty: no time
    unit: int = 1
    usable: str = ""  # SQL: whether an event has all that is needed but a known item
    order: str = "p"  # SQL
    gap: float | None = None
    several: bool = False  # some session ids have several users
    dropped_times: str = ""
    fields: set[str] = field(default_factory=set)

    @property
    def timed(self) -> bool:
        return bool(self.clock)


def id_sql(columns: Columns, role: str) -> str:
    """Returns SQL of an id as a text, or as the whole number that it is in Parquet. Raises `UserError` (3) for another type."""
    source, column = columns.source, columns.need(role)
    kind, raw = source.kinds.get(column, "text"), source.ref(column)
    if kind in NOT_IDS:
        kinds = f"column `{column}` has the wrong type, {source.arrow_type(column)} ({source.path}); ids are strings or whole numbers"
        raise UserError(kinds, DATA)
    if kind in ("integer", "null"):
        return raw if kind == "integer" else "cast(null as varchar)"
    number = kind == "float" or source.kind == "json"
    return f"{'number_id' if number else 'plain_id'}(cell(cast({raw} as varchar)))"


def check_ids_sql(data: Database, table: str, column: str, role: str, columns: Columns) -> None:
    """Raises `UserError` (3) for the first id that is damaged, long or unprintable."""
    if data.one(f"select typeof({column}) from {table} limit 1")[0] != "VARCHAR":
        return
    nested = f"(regexp_matches({column}, '^[\\[{{]') and json_valid({column}))" if columns.source.kind == "json" else "false"
    faults = (
        f"{column} is not null and (starts_with({column}, {BAD}) or strlen({column}) > {MAX_ID_BYTES} or regexp_matches({column}, "
        f"{quoted(CONTROL)}) or {nested})"
    )
    row, text = data.one(f"select min(rowid), arg_min({column}, rowid) from {table} where {faults}")
    if row is None:
        return
    place, theirs = columns.source.where(row), columns.need(role)
    if columns.source.kind == "json" and text[0] in "[{":
        raise UserError(f"`{theirs}` is a list or an object ({place}); ids are strings or whole numbers", DATA)
    if not text.startswith("\1"):
        fault = f"is longer than {MAX_ID_BYTES} bytes" if len(text.encode()) > MAX_ID_BYTES else "has a control character"
        raise UserError(f"{role} {fault} ({place}); every row needs a short, printable {role}", DATA)
    number = float(text[1:])
    if number != int(number):
        raise UserError(f"`{theirs}` {text[1:]} is not an id ({place}); ids are strings or whole numbers", DATA)
    raise UserError(
        f"`{theirs}` {number:.15g} is too large for a number with a point, and has lost digits ({place}); give the ids as strings", DATA
    )


def load_events(
    data: Database, columns: Columns, rules: SessionRules, tables: TableOptions, report: Report, limit: int | None = None
) -> Events:
    """Reads the log, or its first `limit` rows. Raises `UserError` (2, 3)."""
    source = columns.source
    events = Events(data, columns, report.say, report.drop)
    events.group = "session_id" if columns.get("session_id") else "user_id"
    if not columns.get("session_id") and not (columns.get("user_id") and columns.get("timestamp")):
        if columns.get("user_id"):
            fault = (
                f"column `timestamp` is missing ({source.path} has {source.some()}); name it with --column timestamp=NAME, or take all of a"
            )
            raise UserError(f"{fault} user's events as one session with --column session_id={columns.need('user_id')}", DATA)
        if not columns.get("session_id"):
            names = f"no column names the sessions or the users ({source.path} has {source.some()})"
            raise UserError(f"{names}; give --column user_id=NAME (cut at pauses) or --column session_id=NAME{columns.headless}", DATA)
    time_format = tables.time_format or columns.side.time_format
    clock = _load(events, time_format, tables.where or columns.side.where, limit)
    if not source.rows:
        raise UserError(f"no events ({source.path}); a session log needs sessions of two events or more", DATA)
    columns.describe()
    for column, role in (("g", events.group), ("u", "user_id"), ("i", "item_id")):
        if column in events.fields and (role != "item_id" or columns.get("item_id")):
            check_ids_sql(data, "log", column, role, columns)
    if words := data.rows("select w, count(*) from log where w is not null group by w order by w"):
        report.say(f"{source.path}: {', '.join(f'{count:,} cells say {word}' for word, count in words)}: taken as missing")
    if "bad" in events.fields:
        _check_times(events, time_format)
    if "ob" in events.fields and (row := data.one("select min(rowid) from log where ob")[0]) is not None:
        raise UserError(f"`{columns.need('position')}` is not a number ({source.where(row)}); give numbers", DATA)
    _settle(events, clock)
    events.gap = rules.gap if rules.gap is not None or events.group == "session_id" else DEFAULT_GAP
    if events.gap is not None and not events.timed:
        raise UserError(f"a session gap needs a time ({source.path} has {source.some()}); name it with --column timestamp=NAME", DATA)
    return events


def _load(events: Events, time_format: str | None, where: str | None, limit: int | None) -> Clock | None:
    columns, data = events.columns, events.data
    source = columns.source
    select = {"g": id_sql(columns, events.group)}
    if events.group == "session_id" and columns.get("user_id"):
        select["u"] = id_sql(columns, "user_id")
    unnest = None
    if (history := columns.get("history")) is not None:
        last = f"cell({source.ref(columns.need('item_id'))})" if columns.get("item_id") else "cast(null as varchar)"
        earlier = f"cell_list(cell({source.ref(history)}))"
        both = f"list_concat(coalesce({earlier}, []), case when {last} is null then [] else [{last}] end)"
        select["i"], unnest = f"list_transform({both}, lambda x: plain_id(cell(bare(x))))", "i"
    else:
        select["i"] = id_sql(columns, "item_id")
    words = [
        source.ref(column)
        for role in ("session_id", "user_id", "item_id", "timestamp")
        if (column := columns.get(role)) and source.kinds.get(column, "text") == "text"
    ]
    select["w"] = "case " + " ".join(f"when is_word({raw}) then {raw}" for raw in words) + " end" if words else "cast(null as varchar)"
    clock, finish = None, "*"
    if (column := columns.get("timestamp")) is not None:
        clock = find_clock(data, source, column, time_format)
        select["t"] = clock.sql
        if source.kinds.get(column) not in ("time", "integer") or source.arrow_type(column) == pa.uint64():
            select["raw_t"] = f"cell(cast({source.ref(column)} as varchar))"
            finish = "* exclude (raw_t), case when t is null then raw_t end as bad"
    if (column := columns.get("position")) is not None and unnest is None:
        raw = source.ref(column)
        if source.kinds.get(column) in ("integer", "float"):
            select["o"] = f"case when isnan(cast({raw} as double)) then null else cast({raw} as double) end"
        else:
            select["o"] = f"try_cast(cell(cast({raw} as varchar)) as double)"
            select["ob"] = f"(cell(cast({raw} as varchar)) is not null and {select['o']} is null)"
    if time_format is not None and clock is None:
        raise UserError(f"--time-format has no effect: no column of times ({source.path}); name it with --column timestamp=NAME", DATA)
    source.load("log", select, where, limit, unnest=unnest, finish=finish)
    events.fields = {*select, *(["o"] if unnest else []), *(["bad"] if "raw_t" in select else [])}
    if where is not None and not source.rows:
        raise UserError(f"no event fits --where {where} ({source.path}); check its values", DATA)
    return clock


def _check_times(events: Events, time_format: str | None) -> None:
    """Raises `UserError` (3) for the first time that cannot be read."""
    source, column = events.columns.source, events.columns.need("timestamp")
    row, text = events.data.one("select min(rowid), arg_min(bad, rowid) from log where bad is not null")
    if row is None:
        return
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        raise UserError(f"a time is not finite, `{column}` ({source.where(row)}); fix it, or leave the cell empty", DATA)
    forms = f"its notation is not {time_format}" if time_format else "give seconds or ISO 8601, or say the notation with --time-format"
    raise UserError(f"`{column}` {text[:40]!r} is not a time ({source.where(row)}); {forms}", DATA)


def _settle(events: Events, clock: Clock | None) -> None:
    """Finds the unit of the times, drops those that cannot be meant, and decides what orders the events."""
    data, source, say = events.data, events.columns.source, events.say
    order = []
    if clock is None:
        by = (
            f"column `{events.columns.need('position')}`"
            if "o" in events.fields and events.columns.get("position")
            else "order of the file"
        )
        say(f"{source.path}: no time; events are in the {by}, sessions in that of the file, and numbered instead of timed")
        events.usable = "g is not null" + (" and o is not null" if "o" in events.fields else "")
    else:
        theirs = events.columns.need("timestamp")
        events.clock, events.unit, notation = settle_unit(data, "log", "t", clock, source, theirs)
        say(f"{source.path}: times are {notation}" + ("" if notation == "in seconds" or events.unit == 1 else ", written in seconds"))
        low, high = EARLIEST * events.unit, int((time.time() + AHEAD) * events.unit)
        most = LARGEST_SECOND * events.unit
        count, odd, huge, row = data.one(
            f"select count(x), count(*) filter (x not between {low} and {high}), count(*) filter (x not between {-most} and {most}), "
            f"min(r) filter (x not between {low} and {high}) from (select {events.clock} x, rowid r from log where g is not null)"
        )
        limits = (low, high)
        if odd:
            raw, value = data.one(f"select t, {events.clock} from log where rowid = {row}")
            number = f" {raw / clock.scale:.15g}," if not clock.unit else ""
            example = f"`{theirs}`{number} read as {shown(value / events.unit)}"
            if odd > count * FEW or odd == count:
                if events.group != "session_id" and not clock.given:
                    fault = (
                        f"most times are before 1990 or in the future: {example} ({source.where(row)})"
                        if odd > count / 2
                        else f"many times are before 1990 or in the future: {example} ({source.where(row)})"
                    )
                    raise UserError(
                        f"{fault}; say what they are with --time-format excel, days, hours, minutes, seconds, ... or a pattern", DATA
                    )
                say(f"{source.path}: {odd:,} times are before 1990 or in the future ({example}): they order the events, but are no dates")
                limits = (-most, most)
                odd = huge
            if odd:
                events.dropped_times = f"events with a time before 1990 or in the future ({example}, {source.where(row)})"
        events.usable = f"g is not null and t is not null and {events.clock} between {limits[0]} and {limits[1]}"
        order.append(events.clock)
    if "o" in events.fields:
        order.append("o nulls last")
    events.order = ", ".join([*order, "p"])
    missing = data.one(
        f"select count(*) filter (g is null), count(*) filter (g is not null and "
        f"{'t' if clock else 'o' if 'o' in events.fields else 'g'} is null) from log"
    )
    events.drop(f"events without {events.group}", missing[0])
    events.drop("events without a time or position", missing[1])
    usable = data.one(f"select count(*) from log where {events.usable}")[0]
    if events.dropped_times:
        events.drop(events.dropped_times, source.rows - usable - sum(missing))
    if not usable:
        raise UserError(
            f"no event has both {events.group} and a time or position ({source.path}); check --column {events.group}=NAME, --column "
            f"timestamp=NAME",
            DATA,
        )
