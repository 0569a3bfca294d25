"""Groups a raw event log into sessions in SQL, out of core: ordered, filtered, and with every dropped event counted.

Sessions are named by a column or, without one, cut at the pauses of a user. Events are ordered by time, by position or as in the
file; without a time they are numbered instead, so that sessions keep the order of the file.
"""

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
LONG_SESSION = 86_400  # seconds; a session column whose sessions often last longer names visits of weeks
LARGE_SHARE = 0.1  # of the log, in one session or of one user, is pointed out


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
        columns.need("session_id")
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


def key_sessions(events: Events) -> str:
    """Returns SQL of the events with the key `k` of their session: a session id of several users is joined with the user."""
    data, source = events.data, events.columns.source
    selected = "select {k} as k, {u} as u, i, {t} as t, {o} log.rowid as p from log {join} where {usable}"
    values = {
        "k": "g",
        "u": "u" if "u" in events.fields else "g",
        "t": events.clock or "0",
        "o": "o, " if "o" in events.fields else "",
        "join": "",
        "usable": events.usable,
    }
    events.order = ", ".join((["t"] if events.timed else []) + (["o nulls last"] if "o" in events.fields else []) + ["p"])
    if "u" in events.fields:
        data.run(
            "create or replace table shared as select g as sg from log where g is not null and u is not null group by g having min(u) "
            "<> max(u)"
        )
        count, example = data.one("select count(*), min(sg) from shared")
        if count:
            events.several = True
            for sign in ("-", ":", "|", "--", "::"):
                values["k"] = (
                    f"case when sg is not null and log.u is not null then concat(log.u, {quoted(sign)}, log.g) else cast(log.g as "
                    f"varchar) end"
                )
                values["join"] = "left join shared on sg = log.g"
                pairs, names = data.one(
                    f"select count(*), count(distinct k) from (select distinct {values['k']} k, log.g, case when sg is not null then "
                    f"log.u end from log "
                    f"{values['join']} where log.g is not null)"
                )
                if pairs == names:
                    break
            else:
                raise UserError(
                    f"session ids of several users cannot be joined with them without doubt ({source.path}); make them unique", DATA
                )
            values["u"] = "log.u"
            sign = {"-": "user-session"}.get(sign, f"user{sign}session")
            events.say(f"{source.path}: {count:,} session ids have several users (e.g. {str(example)!r}): a session is one of {sign}")
    return selected.format(**values)


def cut_sessions(events: Events, drop_single: bool) -> None:
    """Makes the table `cut` of events with the key `k` and number `n` of their session. `drop_single`: without single events."""
    data, keyed = events.data, key_sessions(events)
    data.run("drop table if exists cut")
    if events.gap is None:
        data.run(f"create table cut as select *, 0 as n from ({keyed})")
        return
    gap = f"> {int(events.gap * events.unit)}"
    window = f"window w as (partition by k order by {events.order})"
    alone = f" qualify not (begins and coalesce(lead(t) over w - t {gap}, true))" if drop_single else ""
    data.run(
        f"create or replace table pauses as select *, coalesce(t - lag(t) over w {gap}, true) as begins from ({keyed}) {window}{alone}"
    )
    data.run(f"create table cut as select * exclude (begins), sum(begins::int) over w as n from pauses {window}")
    data.run("drop table pauses")


def build_sessions(events: Events, catalogue: bool, rules: SessionRules) -> str:
    """Makes the sessions, and returns SQL of their events in order: session_id, item_id, timestamp in ticks and, with users, user_id.

    Sessions have `rules.min_length` usable events or more. `catalogue`: whether the table `items` has the known items. Raises
    `UserError` (3).
    """
    data, source, drop = events.data, events.columns.source, events.drop
    total = _known_items(events, catalogue, rules)
    _point_out(events)
    cut_sessions(events, drop_single=True)
    data.run("create or replace table kept as select cut.* from cut join known on cut.i = known.i where good")
    data.run("drop table cut")
    left = data.one("select count(*) from kept")[0]
    single = total - left
    if rules.collapse:
        data.run(
            f"create or replace table kept as select * from kept qualify i is distinct from lag(i) over (partition by k, n order by "
            f"{events.order})"
        )
        collapsed = left - (left := data.one("select count(*) from kept")[0])
        drop("events of the same item as the event before", collapsed)
    if rules.max_length:
        backwards = ", ".join(
            f"{part.removesuffix(' nulls last')} desc{' nulls first' if part.endswith('last') else ''}" for part in events.order.split(", ")
        )
        data.run(
            f"create or replace table kept as select * from kept qualify row_number() over (partition by k, n order by {backwards}) <= "
            f"{rules.max_length}"
        )
        early = left - (left := data.one("select count(*) from kept")[0])
        drop(f"events before the last {rules.max_length} of a session", early)
    _name_sessions(events, f"having count(*) >= {max(rules.min_length, 2)}")
    count, written, names = data.one("select count(*), coalesce(sum(length), 0), count(distinct session_id) from sessions")
    short = left - written + single
    drop("sessions of one event" if rules.min_length <= 2 else f"events of sessions of fewer than {rules.min_length} events", short)
    if not count:
        raise UserError(_nothing_left(events, rules), DATA)
    if names < count:
        raise UserError(
            f"two sessions would have one id after they are cut ({source.path}); rename the sessions or leave out --session-gap", DATA
        )
    if row := data.first(
        f"select session_id from sessions where strlen(session_id) > {MAX_ID_BYTES} or regexp_matches(session_id, {quoted(CONTROL)})"
    ):
        raise UserError(
            f"session_id {row[0][:40]!r} ... is longer than {MAX_ID_BYTES} bytes ({source.path}); every row needs a short, printable "
            f"session_id",
            DATA,
        )
    if events.gap is not None:
        place = "where a user pauses" if events.group == "user_id" else "also where a session pauses"
        events.say(f"{source.path}: sessions are cut {place} for more than {events.gap / 60:g} minutes")
    elif events.timed:
        _long_sessions(events)
    _mostly_dropped(events, rules, written, short)
    users = ", coalesce(cast(s.u as varchar), s.session_id) as user_id" if events.group == "user_id" or "u" in events.fields else ""
    start = "s.start, " if events.timed else ""
    order = ", ".join(f"kept.{part}" for part in events.order.split(", "))
    return (
        f"select s.session_id, known.id as item_id, kept.t as timestamp{users} from kept join sessions s on s.k = kept.k and s.n = kept.n "
        f"join known on known.i = kept.i order by {start}s.first, {order}"
    )


def _name_sessions(events: Events, condition: str) -> None:
    """Makes the table `sessions` of those in `kept`; the parts of a user, or of a session that is cut, are numbered."""
    numbered = f"row_number() over (partition by k order by {'start, ' * events.timed}first) - 1"
    parts = "true" if events.group == "user_id" else "count(*) over (partition by k) > 1"
    session_id = f"case when {parts} then concat(k, '-', {numbered}) else cast(k as varchar) end"
    events.data.run(
        f"create or replace table sessions as select *, {session_id} as session_id from (select k, n, count(*) as length, min(t) as start, "
        f"max(t) as ending, min(p) as first, arg_min(u, p) filter (u is not null) as u from kept group by k, n {condition})"
    )


def order_sessions(events: Events) -> tuple[int, str]:
    """Returns the number of sessions, and SQL of their events: session_id and item_id, empty if there is none or its time is missing.

    Sessions are in the order of their first event in the files, and complete: each of them is to get an answer.
    """
    data = events.data
    if events.gap is None:
        data.run(f"update log set i = null where not coalesce({events.usable}, false)")
        events.usable = "g is not null"
    cut_sessions(events, drop_single=False)
    data.run("alter table cut rename to kept")
    _name_sessions(events, "")
    count, names = data.one("select count(*), count(distinct session_id) from sessions")
    if names < count:
        raise UserError(f"two sessions would have one id after they are cut ({events.columns.source.path}); rename them", DATA)
    order = ", ".join(f"kept.{part}" for part in events.order.split(", "))
    joined = "kept join sessions s on s.k = kept.k and s.n = kept.n"
    return count, f"select s.session_id, cast(kept.i as varchar) as item_id from {joined} order by s.first, {order}"


def _known_items(events: Events, catalogue: bool, rules: SessionRules) -> int:
    """Makes the table `known` of the log's items, and returns the number of usable events of good ones."""
    data, source, drop = events.data, events.columns.source, events.drop
    missing = data.one(f"select count(*) from log where {events.usable} and i is null")[0]
    drop("events without item_id", missing)
    listed = "cast(c.i as varchar) in (select item_id from items)" if catalogue else "true"
    data.run(
        f"create or replace table known as select c.i, cast(c.i as varchar) as id, n, {listed} as listed, {listed} and n >= "
        f"{rules.min_item_count} as good "
        f"from (select i, count(*) as n from log where {events.usable} and i is not null group by i) c"
    )
    unknown, rare, total, example = data.one(
        "select coalesce(sum(n) filter (not listed), 0), coalesce(sum(n) filter (listed and not good), 0), coalesce(sum(n) filter "
        "(good), 0), "
        "min(id) filter (not listed) from known"
    )
    if unknown:
        other = data.one("select min(item_id) from items")[0]
        if not data.one("select count(*) from known where listed")[0]:
            zero = data.one("select count(*) from known k join items c on ltrim(k.id, '0') = ltrim(c.item_id, '0')")[0]
            hint = "; one of the files has lost the zeros at the beginning of the ids" if zero else ""
            fault = f"no event is of an item of the catalogue ({source.path}, e.g. {example!r}; the catalogue has e.g. {other!r}{hint})"
            raise UserError(f"{fault}; check --column item_id=NAME", DATA)
        events.say(f"{source.path}: item_id {example!r} is not in the catalogue, which has e.g. {other!r}")
        drop("events of items that are not in the catalogue", int(unknown))
    drop(f"events of items with fewer than {rules.min_item_count} events", int(rare))
    if not total:
        raise UserError(f"no event has an item ({source.path}); check --column item_id=NAME, and --min-item-count", DATA)
    return int(total)


def _point_out(events: Events) -> None:
    """Says when one session or user has a large share of the log."""
    for column, role in (("g", events.group), ("u", "user_id")):
        if column in events.fields:
            total, groups, top, most = events.data.one(
                f"select sum(c), count(*), arg_max(x, c), max(c) from (select {column} x, count(*) c from log where {column} is not "
                f"null group by 1)"
            )
            if total and groups >= 10 and most > LARGE_SHARE * total and most > 10 * total / groups:
                theirs = events.columns.need(role)
                events.say(
                    f"warning: {role} {str(top)!r} has {most / total:.0%} of the events ({events.columns.source.path}); if it stands "
                    f"for unknown ones, "
                    f"leave it out with --where \"{theirs} <> '{top}'\""
                )


def _long_sessions(events: Events) -> None:
    count, long, example, span = events.data.one(
        f"select count(*), count(*) filter (ending - start > {LONG_SESSION * events.unit}), arg_max(session_id, ending - start), "
        f"max(ending - start) from sessions"
    )
    if long > FEW * count:
        days = span / events.unit / 86_400
        events.say(
            f"{events.columns.source.path}: {long:,} of {count:,} sessions last longer than a day (e.g. {example!r}: {days:.1f} days); "
            "--session-gap MINUTES cuts them at pauses"
        )


def _mostly_dropped(events: Events, rules: SessionRules, written: int, short: int) -> None:
    rows = events.columns.source.rows
    if written * 2 < rows:
        remedy = f"; {_longer_gap(events)}" if short * 2 > rows - written and events.group == "user_id" else ""
        most = f", {short:,} of them as sessions of too few events" if short else ""
        events.say(f"warning: {1 - written / rows:.1%} of the events are dropped{most} ({events.columns.source.path}){remedy}")


def _longer_gap(events: Events) -> str:
    """Says what to give where cutting leaves single events."""
    sql = (
        f"select median(pause) from (select {events.clock} - lag({events.clock}) over (partition by g order by {events.clock}) as "
        f"pause from log where {events.usable}) where pause > 0"
    )
    pause = (events.data.one(sql)[0] or 0) / events.unit / 60
    some = f" (half of the pauses are longer than {pause:,.0f} minutes)" if pause else ""
    return (
        f"give a longer --session-gap MINUTES{some}, or take all of a user's events as one session with --column "
        f"session_id={events.columns.need('user_id')}"
    )


def _nothing_left(events: Events, rules: SessionRules) -> str:
    path = events.columns.source.path
    if events.group == "user_id":
        return (
            f"cutting at {(events.gap or 0) / 60:g} minutes leaves single events only: no session has two usable events ({path}); "
            f"{_longer_gap(events)}"
        )
    least = "two" if rules.min_length <= 2 else str(rules.min_length)
    return f"no session has {least} usable events ({path}); check --column session_id=NAME and what was dropped"
