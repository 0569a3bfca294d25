"""Loads `sessions.parquet`: ordered sessions of events, each with an item of the catalogue."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, UserError
from pipeline.data.catalog import Catalog, check_unchanged
from pipeline.data.clock import is_clock, read_clock
from pipeline.data.data_folder import ITEMS, SESSIONS, data_file
from pipeline.data.parquet_checks import check_ids, is_text, need_columns, open_parquet, unreadable


@dataclass(frozen=True)
class SessionLog:
    """Sessions of two events or more, ordered by (start, session_id); their events by (timestamp, row of the file)."""

    session_ids: list[str]
    rows: np.ndarray  # (E,) int32, row of each event's item, session after session
    offsets: np.ndarray  # (S + 1,) int64, first event of each session
    start: np.ndarray  # (S,) int64 seconds
    times: np.ndarray  # (E,) int64 seconds, of each event
    dropped: int = 0  # sessions of one event, which are left out
    users: list[str] = field(default_factory=list)  # (S,) user of each session; empty if the file has no users
    last_out: bool = False  # of the protocol last-out, which holds out the last item of each session instead of sessions
    item_ids: Sequence[str] = ()  # (N,) of the rows, as loaded; what the protocol cold-items chooses items by
    withheld: bool = False  # of the protocol cold-items: some items are withheld from these sessions

    def __len__(self) -> int:
        return len(self.session_ids)

    def session_of_event(self) -> np.ndarray:
        """Returns (E,) the number of each event's session."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def session(self, i: int) -> np.ndarray:
        """Returns the item rows of the i-th session."""
        rows: np.ndarray = self.rows[self.offsets[i] : self.offsets[i + 1]]
        return rows

    def select(self, positions: np.ndarray) -> "SessionLog":
        """Returns the sessions at `positions`, in that order."""
        positions = np.asarray(positions, dtype=np.int64)
        lengths = np.diff(self.offsets)[positions]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[positions] - offsets[:-1], lengths)
        return replace(self._without_events(positions), rows=self.rows[events], times=self.times[events], offsets=offsets, dropped=0)

    def keep(self, events: np.ndarray) -> "SessionLog":
        """Returns the log with the events (E,) bool only, without sessions of fewer than two. Raises ValueError if none is left."""
        lengths = np.diff(self.offsets)
        count = np.bincount(self.session_of_event()[events], minlength=len(self))
        sessions = np.flatnonzero(count >= 2)
        if not len(sessions):
            raise ValueError("no session of two events")
        offsets = np.concatenate([[0], np.cumsum(count[sessions])]).astype(np.int64)
        events = events & np.repeat(count >= 2, lengths)
        return replace(self._without_events(sessions), rows=self.rows[events], times=self.times[events], offsets=offsets)

    def moved(self, new_rows: np.ndarray, training: bool = False) -> "SessionLog":
        """Returns the log with the item rows mapped by `new_rows` (N,), without events mapped to -1. Raises ValueError if none is left.

        `training`: whether this is the training part.
        """
        rows = new_rows[self.rows].astype(np.int32)
        remaining = rows >= 0
        if self.last_out and not training:  # the item before the last one was trained on, so it cannot become the target
            remaining &= np.repeat(remaining[self.offsets[1:] - 1], np.diff(self.offsets))
        return replace(self, rows=rows, item_ids=()).keep(remaining)

    def _without_events(self, sessions: np.ndarray) -> "SessionLog":
        """Returns ids, users and starts of `sessions`; the events are still those of the whole log."""
        ids = [self.session_ids[i] for i in sessions]
        users = [self.users[i] for i in sessions] if self.users else []
        return replace(self, session_ids=ids, users=users, start=self.start[sessions])

    def ids_sha256(self) -> str:
        """Returns a hash of the session ids, which identifies the training sessions in manifests."""
        # last-out: all parts have the same ids; cold-items: they may be those of user-hash
        digest = hashlib.sha256(b"last-out" if self.last_out else b"cold-items" if self.withheld else b"")
        for session_id in sorted(self.session_ids):
            text = session_id.encode()
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()


def load_sessions(data: Path, catalog: Catalog) -> SessionLog:
    """Loads the sessions of a data folder. Raises `UserError` (3)."""
    path = data_file(data, SESSIONS)
    schema = open_parquet(path, f"give a folder with {ITEMS} and {SESSIONS}, e.g. from `tpad prepare`").schema_arrow
    need_columns(path, schema, {"session_id": is_text, "item_id": is_text, "timestamp": is_clock})
    users = "user_id" in schema.names and not pa.types.is_null(schema.field("user_id").type)
    if users:
        need_columns(path, schema, {"user_id": is_text})
    columns = ["session_id", "item_id", "timestamp", *(["user_id"] if users else [])]
    try:
        file = pq.ParquetFile(path, read_dictionary=[name for name in columns if name != "timestamp"], page_checksum_verification=True)
        table = file.read(columns=columns, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    if not len(table):
        raise UserError(f"no events ({path}); a session log needs sessions of two events or more", DATA)
    session, session_ids = _codes(path, table["session_id"], "session_id")
    item, item_ids = _codes(path, table["item_id"], "item_id")
    rows = np.array([catalog.row.get(item_id, -1) for item_id in item_ids], dtype=np.int32)[item]
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        raise UserError(
            f"item_id {item_ids[item[unknown[0]]]!r} is not in {ITEMS} ({path} row {unknown[0]}, {len(unknown)} such rows in all); "
            "add the item or drop the events, as `tpad prepare` does",
            DATA,
        )
    check_unchanged(catalog.path, catalog.state)
    clock, unit = read_clock(path, table["timestamp"], "timestamp")
    log = _sessions(path, session, session_ids, rows, clock, unit, table["user_id"] if users else None)
    return replace(log, item_ids=catalog.item_ids)


def _codes(path: Path, column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, list[str]]:
    """Returns (E,) the position of each value in the list of distinct values, and that list."""
    check_ids(column, name, lambda row: f"{path} row {row}")
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    array = encoded.unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.indices.to_numpy().astype(np.int64), array.dictionary.to_pylist()


def _sessions(
    path: Path, session: np.ndarray, ids: list[str], rows: np.ndarray, clock: np.ndarray, unit: int, user: pa.ChunkedArray | None
) -> SessionLog:
    count = np.bincount(session, minlength=len(ids))
    start = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(start, session, clock)
    long = np.flatnonzero(count >= 2)
    if not len(long):
        raise UserError(f"no session has two events ({path}, {len(ids)} sessions); check that session_id groups events", DATA)
    order = pa.table({"start": start[long], "id": [ids[i] for i in long], "session": long})
    order = order.sort_by([("start", "ascending"), ("id", "ascending")])
    sessions = order["session"].to_numpy()
    rank = np.full(len(ids), -1)
    rank[sessions] = np.arange(len(sessions))
    events = np.flatnonzero(rank[session] >= 0)
    events = events[np.lexsort((clock[events], rank[session[events]]))]  # stable: equal times stay in file order
    offsets = np.concatenate([[0], np.cumsum(count[sessions])]).astype(np.int64)
    names = order["id"].to_pylist()
    users = [] if user is None else user.take(events[offsets[:-1]]).to_pylist()  # of the first event
    users = [user_id or name for user_id, name in zip(users, names, strict=False)]
    return SessionLog(names, rows[events], offsets, start[sessions] // unit, clock[events] // unit, int(len(ids) - len(long)), users)
