"""Groups a raw event log into sessions in SQL, out of core: ordered, filtered, and with every dropped event counted.

Sessions are named by a column or, without one, cut at the pauses of a user. Events are ordered by time, by position or as in the
file; without a time they are numbered instead, so that sessions keep the order of the file.
"""

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import MAX_ID_BYTES
from pipeline.data.prepare.database import quoted
from pipeline.data.prepare.events import Events, SessionRules
from pipeline.data.prepare.ids import CONTROL
from pipeline.data.prepare.timestamps import FEW

LONG_SESSION = 86_400  # seconds; a session column whose sessions often last longer names visits of weeks
SAMPLE = 1_000_000  # events, about, from which shares and pauses are estimated for a message
LARGE_SHARE = 0.1  # of the log, in one session or of one user, is pointed out
SIGNS = {"-": "user-session", **{sign: f"user{sign}session" for sign in (":", "|", "--", "::")}}  # between a user and a session id
IN_SESSIONS = "kept join sessions s on s.k = kept.k and s.n = kept.n"


def _keyed(events: Events) -> str:
    """Returns SQL of the events with the key `k` of their session: a session id of several users is joined with the user."""
    key, join = _joined_key(events) if "u" in events.fields else ("g", "")
    fields = "".join(f"{column}, " for column in ("u", "o") if column in events.fields)
    return f"select {key} as k, {fields}i, {events.clock or 0} as t, log.rowid as p from log {join} where {events.usable}"


def _joined_key(events: Events) -> tuple[str, str]:
    data, source = events.data, events.columns.source
    several = "g is not null and u is not null group by g having min(u) <> max(u)"
    data.run(f"create or replace table shared as select g as sg from log where {several}")
    count, example = data.one("select count(*), min(sg) from shared")
    if not count:
        return "g", ""
    join = "left join shared on sg = g"
    for sign, form in SIGNS.items():
        key = f"case when sg is not null and u is not null then concat(u, {quoted(sign)}, g) else cast(g as varchar) end"
        pairs = f"select distinct {key} k, g, case when sg is not null then u end from log {join} where g is not null"
        if data.one(f"select count(*) = count(distinct k) from ({pairs})")[0]:
            source.say(f"{count:,} session ids have several users (e.g. {str(example)!r}): a session is one of {form}")
            return key, join
    raise UserError(f"session ids of several users cannot be joined with them without doubt ({source.path}); make them unique", DATA)


def _cut_sessions(events: Events, drop_single: bool) -> None:
    """Makes the table `kept` of events with the key `k` and number `n` of their session. `drop_single`: without single events."""
    data, keyed = events.data, _keyed(events)
    if events.gap is None:
        data.run(f"create or replace table kept as select *, 0 as n from ({keyed})")
        return
    gap, window = f"> {int(events.gap * events.unit)}", f"window w as (partition by k order by {events.order})"
    alone = f"qualify not (begins and coalesce(lead(t) over w - t {gap}, true))" if drop_single else ""
    begins = f"coalesce(t - lag(t) over w {gap}, true) as begins"
    data.run(f"create or replace table pauses as select *, {begins} from ({keyed}) {window} {alone}")
    data.run(f"create or replace table kept as select * exclude (begins), sum(begins::int) over w as n from pauses {window}")
    data.run("drop table pauses")


def build_sessions(events: Events, catalogue: bool, rules: SessionRules) -> str:
    """Makes the sessions, and returns SQL of their events in order: session_id, item_id, timestamp in ticks and, with users, user_id.

    Sessions have `rules.min_length` usable events or more. `catalogue`: whether the table `items` has the known items. Raises
    `UserError` (3).
    """
    data, source = events.data, events.columns.source
    total = _known_items(events, catalogue, rules)
    _point_out(events)
    _cut_sessions(events, drop_single=True)
    _keep(events, "where i in (select i from known where good)", "")
    single = total - data.count("kept")
    session = "(partition by k, n"
    if rules.collapse:
        condition = f"qualify i is distinct from lag(i) over {session} order by {events.order})"
        _keep(events, condition, "events of the same item as the event before")
    if rules.max_length:
        condition = f"qualify count(*) over {session}) - row_number() over {session} order by {events.order}) < {rules.max_length}"
        _keep(events, condition, f"events before the last {rules.max_length} of a session")
    count, written = _name_sessions(events, f"having count(*) >= {max(rules.min_length, 2)}")
    short = single + data.count("kept") - written
    few = "sessions of one event" if rules.min_length <= 2 else f"events of sessions of fewer than {rules.min_length} events"
    events.report.drop(few, short)
    if not count:
        raise UserError(_nothing_left(events, rules), DATA)
    damaged = f"strlen(session_id) > {MAX_ID_BYTES} or regexp_matches(session_id, {quoted(CONTROL)})"
    if row := data.first(f"select session_id from sessions where {damaged}"):
        fault = f"session_id {row[0][:40]!r} ... is longer than {MAX_ID_BYTES} bytes ({source.path})"
        raise UserError(f"{fault}; every row needs a short, printable session_id", DATA)
    if events.gap is not None:
        place = "where a user pauses" if events.group == "user_id" else "also where a session pauses"
        source.say(f"sessions are cut {place} for more than {events.gap / 60:g} minutes")
    elif events.clock:
        _long_sessions(events)
    _mostly_dropped(events, written, short)
    users = ", coalesce(cast(s.u as varchar), session_id) as user_id" if events.group == "user_id" or "u" in events.fields else ""
    order = f"{'start, ' if events.clock else ''}first, {events.order}"
    return f"select session_id, cast(i as varchar) as item_id, t as timestamp{users} from {IN_SESSIONS} order by {order}"


def _keep(events: Events, condition: str, reason: str) -> None:
    """Drops the events in `kept` that do not fit."""
    before = events.data.count("kept")
    events.data.run(f"create or replace table kept as select * from kept {condition}")
    if reason:
        events.report.drop(reason, before - events.data.count("kept"))


def _name_sessions(events: Events, condition: str) -> tuple[int, int]:
    """Makes the table `sessions` of those in `kept`, and returns their number and that of their events.

    The parts of a user, or of a session that is cut, are numbered.
    """
    numbered = f"concat(k, '-', row_number() over (partition by k order by {'start, ' if events.clock else ''}first) - 1)"
    parts = "true" if events.group == "user_id" else "count(*) over (partition by k) > 1"
    user = "arg_min(u, p) filter (u is not null)" if "u" in events.fields else "k"
    found = f"select k, n, count(*) as length, min(t) as start, max(t) as ending, min(p) as first, {user} as u from kept group by k, n"
    session_id = f"case when {parts} then {numbered} else cast(k as varchar) end as session_id"
    events.data.run(f"create or replace table sessions as select *, {session_id} from ({found} {condition})")
    count, names, written = events.data.one("select count(*), count(distinct session_id), coalesce(sum(length), 0) from sessions")
    if names < count:
        fault = f"two sessions would have one id after they are cut ({events.columns.source.path})"
        raise UserError(f"{fault}; rename the sessions or leave out --session-gap", DATA)
    return int(count), int(written)


def order_sessions(events: Events) -> tuple[int, str]:
    """Returns the number of sessions, and SQL of their events: session_id and item_id, empty if there is none or its time is missing.

    Sessions are in the order of their first event in the files, and complete: each of them is to get an answer.
    """
    if events.gap is None:
        events.data.run(f"update log set i = null where not coalesce({events.usable}, false)")
        events.usable = "g is not null"
    _cut_sessions(events, drop_single=False)
    count, _ = _name_sessions(events, "")
    return count, f"select session_id, cast(i as varchar) as item_id from {IN_SESSIONS} order by first, {events.order}"


def _known_items(events: Events, catalogue: bool, rules: SessionRules) -> int:
    """Makes the table `known` of the log's items, and returns the number of usable events of good ones."""
    data, source, drop = events.data, events.columns.source, events.report.drop
    drop("events without item_id", data.count(f"log where {events.usable} and i is null"))
    listed = "id in (select item_id from items)" if catalogue else "true"
    counted = f"select i, cast(i as varchar) as id, count(*) as n from log where {events.usable} and i is not null group by i"
    good = f"select *, listed and n >= {rules.min_item_count} as good"
    data.run(f"create or replace table known as {good} from (select *, {listed} as listed from ({counted}))")
    sums = (f"coalesce(sum(n) filter ({condition}), 0)" for condition in ("not listed", "listed and not good", "good"))
    unknown, rare, total, example = data.one(f"select {', '.join(sums)}, min(id) filter (not listed) from known")
    if unknown:
        other = data.one("select min(item_id) from items")[0]
        if not data.first("select 1 from known where listed limit 1"):
            zeros = data.first("select 1 from known k join items c on ltrim(k.id, '0') = ltrim(c.item_id, '0') limit 1")
            hint = "; one of the files has lost the zeros at the beginning of the ids" if zeros else ""
            fault = f"no event is of an item of the catalogue ({source.path}, e.g. {example!r}; the catalogue has e.g. {other!r}{hint})"
            raise UserError(f"{fault}; check --column item_id=NAME", DATA)
        source.say(f"item_id {example!r} is not in the catalogue, which has e.g. {other!r}")
        drop("events of items that are not in the catalogue", unknown)
    drop(f"events of items with fewer than {rules.min_item_count} events", rare)
    if not total:
        raise UserError(f"no event has an item ({source.path}); check --column item_id=NAME, and --min-item-count", DATA)
    return int(total)


def _point_out(events: Events) -> None:
    """Says when one session or user has a large share of the log."""
    source = events.columns.source
    for column, role in (("g", events.group), ("u", "user_id")):
        if column in events.fields:
            sampled = f"log where {column} is not null and rowid % {max(1, source.rows // SAMPLE)} = 0"
            total, groups, top, most = events.data.one(
                f"select sum(c), count(*), arg_max(x, c), max(c) from (select {column} x, count(*) c from {sampled} group by 1)"
            )
            if total and groups >= 10 and most > LARGE_SHARE * total and most > 10 * total / groups:
                fault = f"warning: {role} {str(top)!r} has {most / total:.0%} of the events ({source.path})"
                remedy = f"if it stands for unknown ones, leave it out with --where \"{events.columns.need(role)} <> '{top}'\""
                events.report.say(f"{fault}; {remedy}")


def _long_sessions(events: Events) -> None:
    count, long, example, span = events.data.one(
        f"select count(*), count(*) filter (ending - start > {LONG_SESSION * events.unit}), arg_max(session_id, ending - start), "
        f"max(ending - start) from sessions"
    )
    if long > FEW * count:
        longest = f"(e.g. {example!r}: {span / events.unit / 86_400:.1f} days)"
        some = f"{long:,} of {count:,} sessions last longer than a day {longest}"
        events.columns.source.say(f"{some}; --session-gap MINUTES cuts them at pauses")


def _mostly_dropped(events: Events, written: int, short: int) -> None:
    rows, path = events.columns.source.rows, events.columns.source.path
    if written * 2 < rows:
        remedy = f"; {_longer_gap(events)}" if short * 2 > rows - written and events.group == "user_id" else ""
        most = f", {short:,} of them as sessions of too few events" if short else ""
        events.report.say(f"warning: {1 - written / rows:.1%} of the events are dropped{most} ({path}){remedy}")


def _longer_gap(events: Events) -> str:
    """Says what to give where cutting leaves single events."""
    pauses = f"{events.clock} - lag({events.clock}) over (partition by g order by {events.clock}) as pause"
    sampled = f"log where {events.usable} and hash(g) % {max(1, events.columns.source.rows // SAMPLE)} = 0"
    median = events.data.one(f"select median(pause) from (select {pauses} from {sampled}) where pause > 0")[0] or 0
    some = f" (half of the pauses are longer than {median / events.unit / 60:,.0f} minutes)" if median else ""
    user = events.columns.need("user_id")
    return f"give a longer --session-gap MINUTES{some}, or take all of a user's events as one session with --column session_id={user}"


def _nothing_left(events: Events, rules: SessionRules) -> str:
    path = events.columns.source.path
    if events.group == "user_id":
        fault = f"cutting at {(events.gap or 0) / 60:g} minutes leaves single events only: no session has two usable events ({path})"
        return f"{fault}; {_longer_gap(events)}"
    least = "two" if rules.min_length <= 2 else str(rules.min_length)
    return f"no session has {least} usable events ({path}); check --column session_id=NAME and what was dropped"
