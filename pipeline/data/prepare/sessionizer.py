"""Groups a raw event log into sessions: ordered, filtered, and with every dropped event counted.

Sessions are named by a column or, without one, cut at the pauses of a user. Events are ordered by time, by position or as in the
file; without a time they are numbered instead, so that sessions keep the order of the file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import check_ids
from pipeline.data.prepare.tables import SourceTable
from pipeline.data.prepare.timestamps import codes, is_number, read_times


@dataclass(frozen=True)
class SessionRules:
    """How sessions are cut and filtered."""

    gap: float  # longest pause in seconds inside a session, if no column names sessions
    min_item_count: int  # events of items with fewer events are dropped
    max_length: int  # longest session in events, of which the last are kept; 0: no limit


@dataclass
class _Events:
    """The remaining events; every array (E,)."""

    place: np.ndarray  # orders events of equal time: row of the file, or rank of the position
    session: np.ndarray  # number of the session; before sessions are cut, of the user
    item: np.ndarray  # index into the distinct item_ids of the log
    order: np.ndarray  # time or position; zeros if the file gives the order

    def keep(self, mask: np.ndarray) -> "_Events":
        return _Events(self.place[mask], self.session[mask], self.item[mask], self.order[mask])


def build_sessions(
    source: SourceTable,
    columns: dict[str, str],
    item_ids: pa.ChunkedArray,
    rules: SessionRules,
    drop: Callable[[str, int], None],
    note: Callable[[str], None],
) -> pa.Table:
    """Returns a table of (session_id, item_id, timestamp in seconds) and, if the log has it, user_id. Raises `UserError` (3).

    Sessions have two usable events or more. `columns`: our column -> the file's. `drop(reason, count)` counts dropped events, and
    `note(text)` records how the log was read.
    """
    if not source.rows:
        raise UserError(f"no events ({source.path}); a session log needs sessions of two events or more", DATA)
    groups = "session_id" if "session_id" in columns else "user_id"
    if groups not in columns or (groups == "user_id" and "timestamp" not in columns):
        source.need(columns, "session_id" if "user_id" not in columns else "timestamp")
    item, log_ids = codes(source.ids(source.need(columns, "item_id")))
    group, names = codes(source.ids(columns[groups]))
    order, unit, ordered = _order(source, columns, note)
    place = np.arange(source.rows)
    timed = "timestamp" in columns
    if timed and "position" in columns:
        place[np.argsort(_numbers(source, columns["position"]), kind="stable")] = np.arange(source.rows)
    events = _Events(place, group, item, order)
    for reason, mask in ((f"events without {groups}", group >= 0), ("events without a time or position", ordered)):
        drop(reason, (~mask).sum())
    events = events.keep((group >= 0) & ordered)
    if not len(events.place):
        raise UserError(f"no event has both {groups} and a time or position ({source.path}); check --column {groups}=NAME", DATA)
    users: list[str] = []
    if groups == "session_id" and "user_id" in columns:
        try:
            users = _users(group, names, source.ids(columns["user_id"]))
        except UserError as error:  # named sessions need no users
            note(f"users left out: {error}")
    if groups == "user_id":
        events, names, users = _cut(events, names, rules.gap * unit)
        note(f"{source.path}: sessions are cut where a user pauses for more than {rules.gap / 60:g} minutes")
    events = _filter(events, log_ids, item_ids, rules, timed, drop, source)
    table = _table(events, names, log_ids, unit if timed else 0)
    if users:
        table = table.append_column("user_id", pa.array([users[i] for i in events.session], pa.string()))
    check_ids(table["session_id"], "session_id", lambda _: str(source.path))
    return table


def _users(session: np.ndarray, names: list[str], user_ids: pa.ChunkedArray) -> list[str]:
    """Returns the user of each session, from its first event with one; a session without any is a user of its own."""
    user, users = codes(user_ids)
    events = np.flatnonzero((session >= 0) & (user >= 0))[::-1]  # the first event is assigned last
    user_of_session = np.full(len(names), -1)
    user_of_session[session[events]] = user[events]
    return [users[number] if number >= 0 else name for number, name in zip(user_of_session, names, strict=True)]


def _order(source: SourceTable, columns: dict[str, str], note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """Returns what orders the events (E,), its units in a second, and where it is known (E,)."""
    if "timestamp" in columns:
        return read_times(source, columns["timestamp"], note)
    source_of_order = f"column `{columns['position']}`" if "position" in columns else "order of the file"
    note(f"{source.path}: no time; events are in the {source_of_order}, sessions in that of the file, and numbered instead of timed")
    if "position" not in columns:
        return np.zeros(source.rows), 1, np.ones(source.rows, bool)
    position = _numbers(source, columns["position"])
    return position, 1, ~np.isnan(position)


def _numbers(source: SourceTable, name: str) -> np.ndarray:
    """Reads a column as (E,) float64, NaN where the cell is empty."""
    values = source.column(name)
    try:
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), None, values)
        return np.asarray(pc.fill_null(values.cast(pa.float64()), np.nan).to_numpy())
    except pa.ArrowException:
        row = next((i for i, value in enumerate(source.values(name)) if not is_number(value)), 0)
        raise UserError(f"`{name}` is not a number ({source.where(row)}); give numbers", DATA) from None


def _cut(events: _Events, users: list[str], gap: float) -> tuple[_Events, list[str], list[str]]:
    """Cuts each user's events at pauses of more than `gap` into sessions `user-0`, `user-1`, ...; returns also their names and users."""
    order = np.lexsort((events.place, events.order, events.session))
    user, clock = events.session[order], events.order[order]
    new_user = np.r_[True, user[1:] != user[:-1]][: len(user)]
    begins = new_user | np.r_[True, np.diff(clock) > gap][: len(user)]
    session = np.cumsum(begins) - 1
    first = np.maximum.accumulate(np.where(new_user, session, 0))  # first session of the same user
    names = [f"{users[u]}-{n}" for u, n in zip(user[begins], (session - first)[begins], strict=True)]
    return _Events(events.place[order], session, events.item[order], clock), names, [users[u] for u in user[begins]]


def _filter(
    events: _Events,
    log_ids: list[str],
    item_ids: pa.ChunkedArray,
    rules: SessionRules,
    timed: bool,
    drop: Callable[[str, int], None],
    source: SourceTable,
) -> _Events:
    """Returns the usable events, sorted by session (start, place in the file) and in order inside each session."""
    drop("events without item_id", (events.item < 0).sum())
    events = events.keep(events.item >= 0)
    known = pc.is_in(pa.array(log_ids, pa.string()), item_ids.combine_chunks()).to_numpy(zero_copy_only=False)[events.item]
    if not known.any():
        example = f"{log_ids[0]!r}" if log_ids else "none"
        raise UserError(f"no event is of an item of the catalogue ({source.path}, e.g. {example}); check --column item_id=NAME", DATA)
    drop("events of items that are not in the catalogue", (~known).sum())
    events = events.keep(known)
    rare = np.bincount(events.item)[events.item] < rules.min_item_count
    drop(f"events of items with fewer than {rules.min_item_count} events", rare.sum())
    events = _sorted(events.keep(~rare), timed)
    if rules.max_length:
        count = np.bincount(events.session)
        last = np.cumsum(count[_runs(events.session)]).repeat(count[_runs(events.session)])
        early = np.arange(len(last)) < last - rules.max_length
        drop(f"events before the last {rules.max_length} of a session", early.sum())
        events = events.keep(~early)
    count = np.bincount(events.session)
    short = count[events.session] < 2
    drop("sessions of one event", short.sum())
    if short.all():
        raise UserError(f"no session has two usable events ({source.path}); check --column session_id=NAME and what was dropped", DATA)
    return events.keep(~short)


def _runs(session: np.ndarray) -> np.ndarray:
    """Returns the session numbers in the order in which they occur."""
    return session[np.flatnonzero(np.r_[True, session[1:] != session[:-1]][: len(session)])]


def _sorted(events: _Events, timed: bool) -> _Events:
    count = int(events.session.max(initial=-1)) + 1
    start = np.full(count, np.inf if timed else 0.0)
    np.minimum.at(start, events.session, events.order if timed else 0.0)
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, events.session, events.place)
    order = np.lexsort((events.place, events.order, events.session, first[events.session], start[events.session]))
    return events.keep(order)


def _table(events: _Events, names: list[str], log_ids: list[str], unit: int) -> pa.Table:
    clock = events.order // unit if unit else np.arange(len(events.place))
    return pa.table(
        {
            "session_id": pa.array([names[i] for i in events.session], pa.string()),
            "item_id": pa.array([log_ids[i] for i in events.item], pa.string()),
            "timestamp": pa.array(clock.astype(np.int64)),
        }
    )
