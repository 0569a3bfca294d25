"""Reads a log of events into the table `log`, and settles what groups and orders them."""

import time
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.prepare.columns import Columns
from pipeline.data.prepare.database import Database
from pipeline.data.prepare.ids import check_ids_sql, id_sql
from pipeline.data.prepare.table_options import Report, TableOptions
from pipeline.data.prepare.timestamps import AHEAD, EARLIEST, FEW, LARGEST_SECOND, Clock, find_clock, settle_unit, shown

DEFAULT_GAP = 30 * 60.0  # seconds


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
    report: Report
    group: str  # session_id or user_id
    gap: float | None  # longest pause inside a session
    clock: str = ""  # SQL of the time, in `unit` ticks a second; empty: no time
    unit: int = 1
    usable: str = ""  # SQL: whether an event has all that is needed but a known item
    fields: set[str] = field(default_factory=set)

    @property
    def order(self) -> str:
        """SQL of the order inside a session; p is the row."""
        return f"{'t, ' if self.clock else ''}{'o nulls last, ' if 'o' in self.fields else ''}p"


def load_events(
    data: Database, columns: Columns, rules: SessionRules, tables: TableOptions, report: Report, limit: int | None = None
) -> Events:
    """Reads the log, or its first `limit` rows. Raises `UserError` (2, 3)."""
    source, group = columns.source, _group(columns)
    events = Events(data, columns, report, group, rules.gap if rules.gap is not None or group == "session_id" else DEFAULT_GAP)
    time_format = tables.time_format or columns.side.time_format
    clock = _load(events, time_format, tables.where or columns.side.where, limit)
    if not source.rows:
        raise UserError(f"no events ({source.path}); a session log needs sessions of two events or more", DATA)
    columns.describe()
    for column, role in (("g", group), ("u", "user_id"), ("i", "item_id")):
        if column in events.fields and columns.get(role):
            check_ids_sql(columns, "log", column, role)
    if words := data.rows("select w, count(*) from log where w is not null group by w order by w"):
        source.say(f"{', '.join(f'{count:,} cells say {word}' for word, count in words)}: taken as missing")
    _check_values(events, time_format)
    if clock is not None:
        _settle_times(events, clock)
    else:
        by = f"column `{columns.need('position')}`" if "o" in events.fields and columns.get("position") else "order of the file"
        source.say(f"no time; events are in the {by}, sessions in that of the file, and numbered instead of timed")
        events.usable = "g is not null" + (" and o is not null" if "o" in events.fields else "")
        _count_losses(events, "o" if "o" in events.fields else "g", "")
    if events.gap is not None and clock is None:
        raise UserError(f"a session gap needs a time ({source.path} has {source.some()}); name it with --column timestamp=NAME", DATA)
    return events


def _group(columns: Columns) -> str:
    """Returns what the sessions are made of, session_id or user_id. Raises `UserError` (3) if a log has neither."""
    has = f"({columns.source.path} has {columns.source.some()})"
    if columns.get("session_id"):
        return "session_id"
    if not columns.get("user_id"):
        remedy = f"give --column user_id=NAME (cut at pauses) or --column session_id=NAME{columns.headless}"
        raise UserError(f"no column names the sessions or the users {has}; {remedy}", DATA)
    if not columns.get("timestamp"):
        remedy = f"take all of a user's events as one session with --column session_id={columns.need('user_id')}"
        raise UserError(f"column `timestamp` is missing {has}; name it with --column timestamp=NAME, or {remedy}", DATA)
    return "user_id"


def _load(events: Events, time_format: str | None, where: str | None, limit: int | None) -> Clock | None:
    """Makes the table `log`, and returns how its times are read."""
    columns, source = events.columns, events.columns.source
    words = [
        source.ref(column)
        for role in ("session_id", "user_id", "item_id", "timestamp")
        if (column := columns.get(role)) and source.kinds.get(column, "text") == "text"
    ]
    select = {"w": f"case {' '.join(f'when is_word({word}) then {word}' for word in words)} end" if words else "cast(null as varchar)"}
    select["g"] = id_sql(columns, events.group)
    if events.group == "session_id" and columns.get("user_id"):
        select["u"] = id_sql(columns, "user_id")
    if (history := columns.get("history")) is not None:
        last = f"cell({source.ref(columns.need('item_id'))})" if columns.get("item_id") else "cast(null as varchar)"
        both = f"list_concat(coalesce(cell_list(cell({source.ref(history)})), []), case when {last} is null then [] else [{last}] end)"
        items = f"list_transform({both}, lambda x: plain_id(cell(bare(x))))"
        select |= {"i": f"unnest({items})", "o": f"generate_subscripts({items}, 1)"}
    else:
        select["i"] = id_sql(columns, "item_id")
        if (column := columns.get("position")) is not None:
            numeric, text = source.kinds.get(column) in ("integer", "float"), source.text(column)
            value = f"try_cast({source.ref(column) if numeric else text} as double)"
            select["o"] = f"case when isnan({value}) then null else {value} end"
            select["odd_o"] = "false" if numeric else f"{text} is not null and {value} is null"
    clock = None
    if (column := columns.get("timestamp")) is not None:
        clock = find_clock(source, column, time_format)
        select["t"] = clock.sql
        if source.kinds.get(column) not in ("time", "integer") or source.arrow_type(column) == pa.uint64():
            select["odd_t"] = f"case when {clock.sql} is null then {source.text(column)} end"
    elif time_format is not None:
        raise UserError(f"--time-format has no effect: no column of times ({source.path}); name it with --column timestamp=NAME", DATA)
    source.load("log", select, where, limit)
    events.fields = {*select}
    if where is not None and not source.rows:
        raise UserError(f"no event fits --where {where} ({source.path}); check its values", DATA)
    return clock


def _check_values(events: Events, time_format: str | None) -> None:
    """Raises `UserError` (3) for the first time or position that cannot be read."""
    columns, source = events.columns, events.columns.source
    if "odd_t" in events.fields:
        row, text = events.data.one("select min(rowid), arg_min(odd_t, rowid) from log where odd_t is not null")
        if row is not None and text.lower().lstrip("+-") in ("inf", "infinity"):
            fault = f"a time is not finite, `{columns.need('timestamp')}` ({source.where(row)})"
            raise UserError(f"{fault}; fix it, or leave the cell empty", DATA)
        if row is not None:
            forms = (
                f"its notation is not {time_format}" if time_format else "give seconds or ISO 8601, or say the notation with --time-format"
            )
            raise UserError(f"`{columns.need('timestamp')}` {text[:40]!r} is not a time ({source.where(row)}); {forms}", DATA)
    if "odd_o" in events.fields and (row := events.data.one("select min(rowid) from log where odd_o")[0]) is not None:
        raise UserError(f"`{columns.need('position')}` is not a number ({source.where(row)}); give numbers", DATA)


def _settle_times(events: Events, clock: Clock) -> None:
    """Finds the unit of the times, and drops those that cannot be meant."""
    data, source, theirs = events.data, events.columns.source, events.columns.need("timestamp")
    events.clock, events.unit, notation = settle_unit(source, "log", "t", clock, theirs)
    source.say(f"times are {notation}" + ("" if notation == "in seconds" or events.unit == 1 else ", written in seconds"))
    low, high, most = EARLIEST * events.unit, int((time.time() + AHEAD) * events.unit), LARGEST_SECOND * events.unit
    odd = f"filter (x not between {low} and {high})"
    count, some, huge, row = data.one(
        f"select count(x), count(*) {odd}, count(*) filter (x not between {-most} and {most}), min(r) {odd} "
        f"from (select {events.clock} x, rowid r from log where g is not null)"
    )
    example = ""
    if some:
        raw, value = data.one(f"select t, {events.clock} from log where rowid = {row}")
        number = f" {raw / clock.scale:.15g}," if not clock.unit else ""
        example = f"`{theirs}`{number} read as {shown(value / events.unit)}"
    if some > count * FEW:
        if events.group != "session_id" and not clock.given:
            fault = f"{'most' if some > count / 2 else 'many'} times are before 1990 or in the future: {example} ({source.where(row)})"
            remedy = "say what they are with --time-format excel, days, hours, minutes, seconds, ... or a pattern"
            raise UserError(f"{fault}; {remedy}", DATA)
        source.say(f"{some:,} times are before 1990 or in the future ({example}): they order the events, but are no dates")
        low, high, some = -most, most, huge
    events.usable = f"g is not null and t is not null and {events.clock} between {low} and {high}"
    _count_losses(events, "t", f"events with a time before 1990 or in the future ({example}, {source.where(row)})" if some else "")


def _count_losses(events: Events, orders: str, others: str) -> None:
    """Counts the events without a group, or without the field `orders`, and those that are not usable for another reason."""
    rows, grouped, ordered, usable = events.data.one(
        f"select count(*), count(g), count(*) filter (g is not null and {orders} is not null), count(*) filter ({events.usable}) from log"
    )
    events.report.drop(f"events without {events.group}", rows - grouped)
    events.report.drop("events without a time or position", grouped - ordered)
    if others:
        events.report.drop(others, ordered - usable)
    if not usable:
        fault = f"no event has both {events.group} and a time or position ({events.columns.source.path})"
        raise UserError(f"{fault}; check --column {events.group}=NAME, --column timestamp=NAME", DATA)
