"""A raw event log -> sessions: events grouped, put in order, filtered, every loss counted.

Sessions come from a column of their names or, where there is none, from pauses of a user. Order comes from a time, a position
or the file itself; without a time, the events are numbered instead, so that sessions keep the order of the file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.catalog import check_ids, is_text
from pipeline.core.errors import DATA, UserError
from pipeline.tables import Source

UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
LARGEST_SECOND = 10**11  # the year 5138; times above are in a finer unit
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class SessionRules:
    gap: float  # seconds of pause of a user that end a session, where no column names sessions
    min_item_count: int  # events of rarer items are dropped
    max_length: int  # only the last so many events of a session are kept; 0: all


@dataclass
class _Events:
    """The events still in the log; every array (E,)."""

    place: np.ndarray  # decides between equal times: row of the file, or rank of the position
    session: np.ndarray  # number of the session, or of the user before sessions are cut
    item: np.ndarray  # position in the list of distinct item_ids of the log
    order: np.ndarray  # time or position; zeros where the file gives the order

    def keep(self, mask: np.ndarray) -> "_Events":
        return _Events(self.place[mask], self.session[mask], self.item[mask], self.order[mask])


def build_sessions(
    source: Source,
    columns: dict[str, str],
    item_ids: pa.ChunkedArray,
    rules: SessionRules,
    drop: Callable[[str, int], None],
    note: Callable[[str], None],
) -> pa.Table:
    """(session_id, item_id, timestamp in seconds) of the sessions with two usable events or more, and the user_id where the log has one.

    `columns`: our column -> the file's. `drop(reason, count)` and `note(text)` hear what happened.
    """
    if not source.rows:
        raise UserError(f"no events ({source.path}); a session log needs sessions of two events or more", DATA)
    groups = "session_id" if "session_id" in columns else "user_id"
    if groups not in columns or (groups == "user_id" and "timestamp" not in columns):
        source.need(columns, "session_id" if "user_id" not in columns else "timestamp")
    item, log_ids = _codes(source.ids(source.need(columns, "item_id")))
    group, names = _codes(source.ids(columns[groups]))
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
        except UserError as error:  # sessions have their own names, and need no users
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
    """The user of each session, that of its first event; one without is a user of its own."""
    whose, users = _codes(user_ids)
    there = np.flatnonzero((session >= 0) & (whose >= 0))[::-1]
    of = np.full(len(names), -1)
    of[session[there]] = whose[there]
    return [users[user] if user >= 0 else name for user, name in zip(of, names, strict=True)]


def _codes(values: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """(E,) position in the list of distinct values, -1 for null."""
    encoded = values.combine_chunks().dictionary_encode()
    chunk = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    return chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), chunk.dictionary.to_pylist()


def _order(source: Source, columns: dict[str, str], note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """(E,) what orders the events, units of it a second, (E,) where it is known."""
    if "timestamp" in columns:
        return read_times(source, columns["timestamp"], note)
    said = f"column `{columns['position']}`" if "position" in columns else "order of the file"
    note(f"{source.path}: no time; events are in the {said}, sessions in that of the file, and numbered instead of timed")
    if "position" not in columns:
        return np.zeros(source.rows), 1, np.ones(source.rows, bool)
    position = _numbers(source, columns["position"])
    return position, 1, ~np.isnan(position)


def _numbers(source: Source, name: str) -> np.ndarray:
    """(E,) float64, NaN where the cell is empty."""
    values = source.column(name)
    try:
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), None, values)
        return np.asarray(pc.fill_null(values.cast(pa.float64()), np.nan).to_numpy())
    except pa.ArrowException:
        row = next((i for i, value in enumerate(source.values(name)) if not _is_number(value)), 0)
        raise UserError(f"`{name}` is not a number ({source.where(row)}); give numbers", DATA) from None


def _is_number(value: object) -> bool:
    try:
        return value is None or not str(value).strip() or math.isfinite(float(str(value)))
    except ValueError:
        return False


def read_times(source: Source, name: str, note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """(E,) int64 times, units of them a second, (E,) where there is one."""
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


def _whole_times(source: Source, clock: np.ndarray, known: np.ndarray, note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """Seconds or a finer unit, or, where all can be, days written as 20240131."""
    there = clock[known]
    year, month, day = there // 10_000, there // 100 % 100, there % 100
    if len(there) and ((year >= 1990) & (year <= 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all():
        note(f"{source.path}: times are days, as {there[0]}")
        months = (clock // 10_000 - 1970) * 12 + clock // 100 % 100 - 1
        days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + clock % 100 - 1
        return np.where(known, days * 86_400, 0), 1, known
    return clock, _unit(source, clock, known, note), known


def _float_times(source: Source, clock: np.ndarray, known: np.ndarray, note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    endless = known & ~np.isfinite(clock)
    if endless.any():
        raise UserError(f"a time is not finite ({source.where(int(np.argmax(endless)))}); mend it, or leave the cell empty", DATA)
    if (clock == np.floor(clock)).all():
        return _whole_times(source, clock.astype(np.int64), known, note)
    unit = _unit(source, clock, known, note)
    if unit == 1:
        return np.round(clock * 1000).astype(np.int64), 1000, known  # the fraction of a second orders events too
    return np.floor(clock).astype(np.int64), unit, known


def _text_times(source: Source, name: str, note: Callable[[str], None]) -> tuple[np.ndarray, int, np.ndarray]:
    """Numbers, or dates and times in ISO 8601 (those without a zone in UTC)."""
    code, texts = _codes(source.ids(name))
    known = code >= 0
    numbers = [_is_number(text) for text in texts]
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


def _unit(source: Source, clock: np.ndarray, known: np.ndarray, note: Callable[[str], None]) -> int:
    largest = clock[known].max(initial=0)
    unit = next((unit for unit in UNITS if largest < LARGEST_SECOND * unit), 10**9)
    smallest = clock[known].min(initial=largest)
    if unit > 1 and smallest < LARGEST_SECOND * unit // 10**4:  # 1970-04 in this unit: rather a time in a coarser one
        row = int(np.argmax(known & (clock == smallest)))
        raise UserError(f"times are partly in {UNITS[unit]}, partly in a coarser unit ({source.where(row)}); use one unit", DATA)
    if unit > 1:
        note(f"{source.path}: times are in {UNITS[unit]}, written in seconds")
    return unit


def _cut(events: _Events, users: list[str], gap: float) -> tuple[_Events, list[str], list[str]]:
    """Sessions of each user: a pause of more than `gap` begins a new one, named `user-0`, `user-1`, ...; their names and users."""
    order = np.lexsort((events.place, events.order, events.session))
    user, clock = events.session[order], events.order[order]
    new_user = np.r_[True, user[1:] != user[:-1]][: len(user)]
    begins = new_user | np.r_[True, np.diff(clock) > gap][: len(user)]
    session = np.cumsum(begins) - 1
    first = np.maximum.accumulate(np.where(new_user, session, 0))  # of the same user
    names = [f"{users[u]}-{n}" for u, n in zip(user[begins], (session - first)[begins], strict=True)]
    return _Events(events.place[order], session, events.item[order], clock), names, [users[u] for u in user[begins]]


def _filter(
    events: _Events,
    log_ids: list[str],
    item_ids: pa.ChunkedArray,
    rules: SessionRules,
    timed: bool,
    drop: Callable[[str, int], None],
    source: Source,
) -> _Events:
    """The usable events, session after session by (start, place in the file), in order inside each."""
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
    """The sessions in the order in which they come."""
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
