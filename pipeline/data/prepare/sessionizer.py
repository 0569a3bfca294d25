"""Groups a raw event log into sessions in SQL, out of core: ordered, filtered, and with every dropped event counted.

Sessions are named by a column or, without one, cut at the pauses of a user. Events are ordered by time, by position or as in the
file; without a time they are numbered instead, so that sessions keep the order of the file.
"""

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import MAX_ID_BYTES
from pipeline.data.prepare.database import quoted
from pipeline.data.prepare.events import CONTROL, Events, SessionRules
from pipeline.data.prepare.timestamps import FEW

LONG_SESSION = 86_400  # seconds; a session column whose sessions often last longer names visits of weeks
SAMPLE = 1_000_000  # events, about, from which shares and pauses are estimated for a message
LARGE_SHARE = 0.1  # of the log, in one session or of one user, is pointed out


def key_sessions(events: Events) -> str:
    """Returns SQL of the events with the key `k` of their session: a session id of several users is joined with the user."""
    data, source = events.data, events.columns.source
    selected = "select {k} as k, {u} i, {t} as t, {o} log.rowid as p from log {join} where {usable}"
    values = {
        "k": "g",
        "u": "u, " if "u" in events.fields else "",
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
            values["u"] = "log.u, "
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
    user = "arg_min(u, p) filter (u is not null)" if "u" in events.fields else "k"
    session_id = f"case when {parts} then concat(k, '-', {numbered}) else cast(k as varchar) end"
    events.data.run(
        f"create or replace table sessions as select *, {session_id} as session_id from (select k, n, count(*) as length, min(t) as start, "
        f"max(t) as ending, min(p) as first, {user} as u from kept group by k, n {condition})"
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
    rows = events.columns.source.rows
    for column, role in (("g", events.group), ("u", "user_id")):
        if column in events.fields:
            total, groups, top, most = events.data.one(
                f"select sum(c), count(*), arg_max(x, c), max(c) from (select {column} x, count(*) c from log where {column} is not "
                f"null and rowid % {max(1, rows // SAMPLE)} = 0 group by 1)"
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
        f"pause from log where {events.usable} and hash(g) % {max(1, events.columns.source.rows // SAMPLE)} = 0) where pause > 0"
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
