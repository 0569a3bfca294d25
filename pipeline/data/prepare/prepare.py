"""Converts foreign catalogues and logs to `items.parquet` and `sessions.parquet`, the files every other step reads.

Unusable events are dropped and counted; a faulty item is an error, because a catalogue is expected to be correct. Items without an
event are kept: they are cold items. Images are copied into the file, so the folder is complete. A log without a catalogue gives
items that have nothing but ids.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.core.progress import Steps
from pipeline.data.data_folder import ITEMS, SESSIONS, publish_pair
from pipeline.data.prepare.database import Database, database
from pipeline.data.prepare.download import Downloads
from pipeline.data.prepare.events import Events, SessionRules, load_events
from pipeline.data.prepare.item_images import ItemImages
from pipeline.data.prepare.items import load_items, plain, select_sql
from pipeline.data.prepare.open_tables import open_tables
from pipeline.data.prepare.sessionizer import IN_SESSIONS, build_sessions
from pipeline.data.prepare.table_options import Paths, Report, TableOptions

GROUP_ROWS = 1024  # of a row group of items.parquet
SESSION_ROWS = 2**20  # rows of a row group of sessions.parquet
PREVIEW_ROWS = 200_000  # rows of each file that a preview reads

OnBadImage = Literal["error", "text_only"]
BAD_IMAGES = get_args(OnBadImage)


@dataclass(frozen=True)
class PrepareOptions:
    """The arguments of `tpad prepare`."""

    items: Paths | None  # None: the items of the sessions, without content
    sessions: Paths
    out: Path
    images: Path | None = None  # folder of files named item_id.jpg (.png, ...), or to which the `image` column's paths are relative
    session_gap_minutes: float | None = None  # a longer pause starts a new session; None: 30 where no column names sessions
    min_item_count: int = 1  # events of items with fewer events are dropped
    max_session_length: int = 0  # longest session in events, of which the last are kept; 0: no limit
    on_bad_image: OnBadImage = "error"
    min_session_length: int = 2
    collapse_repeats: bool = False
    table: TableOptions = field(default_factory=TableOptions)
    dry_run: bool = False
    download_images: bool = False
    allow_private: bool = False  # download from addresses of private networks too


@dataclass
class PrepareSummary(Report):
    """Counts of what was read, dropped and written."""

    out: Path = Path()
    items: int = 0
    cold: int = 0  # items without an event
    images: int = 0
    sessions: int = 0
    events: int = 0
    preview: list[str] = field(default_factory=list)  # first sessions and items, of a dry run

    def lines(self) -> list[str]:
        """Returns the summary as lines of text."""
        if self.preview:
            sample = f"preview: {self.items:,} items, {self.events:,} events in {self.sessions:,} sessions; nothing is written"
            return [*self.read_lines(), *self.preview, sample]
        return [
            *self.read_lines(),
            f"wrote: {self.items:,} items ({self.images:,} with an image, {self.cold:,} without an event) to {self.out / ITEMS}",
            f"wrote: {self.events:,} events in {self.sessions:,} sessions to {self.out / SESSIONS}",
        ]


def prepare(options: PrepareOptions, summary: PrepareSummary | None = None) -> PrepareSummary:
    """Writes both files or, on any error, neither; `summary` then has what was read and dropped before it. Raises `UserError`."""
    _check(options)
    summary = summary or PrepareSummary()
    summary.out = options.out
    limit = PREVIEW_ROWS if options.dry_run else None
    with database(options.out, options.table.memory) as data:
        log, items = open_tables(data, options.sessions, options.items, options.table, summary)
        columns, images = {"item_id": "item_id", "title": "title"}, None
        if items is not None:
            columns = load_items(items, limit)
            downloads = Downloads(options.out / "images-cache", options.allow_private) if options.download_images else None
            images = ItemImages(items, options.images, options.on_bad_image == "text_only", downloads, summary)
        gap = None if options.session_gap_minutes is None else options.session_gap_minutes * 60
        rules = SessionRules(gap, options.min_item_count, options.min_session_length, options.max_session_length, options.collapse_repeats)
        events = load_events(data, log, rules, options.table, summary, limit)
        sql = build_sessions(events, items is not None, rules)
        if items is None:
            ids = f"select cast(i as varchar) as item_id, cast(null as varchar) as title from {IN_SESSIONS} group by i order by min(p)"
            data.run(f"create table items as {ids}")
        summary.sessions, summary.events = data.one("select count(*), sum(length) from sessions")
        summary.items = data.count("items")
        summary.cold = summary.items - data.one(f"select count(distinct i) from {IN_SESSIONS}")[0]
        if options.dry_run:
            summary.preview = _preview(data, columns, sql, events)
            return summary
        if images is not None:
            images.fetch()
        with publish_pair(options.out) as folder:
            _write_items(folder / ITEMS, data, columns, images, summary)
            _write_sessions(folder / SESSIONS, data, sql, events)
    return summary


def _check(options: PrepareOptions) -> None:
    """Raises `UserError` for options that do not fit each other or are out of range."""
    gap, images, longest = options.session_gap_minutes, options.images, options.max_session_length
    lengths_fit = options.min_session_length >= 2 and not 0 < longest < options.min_session_length
    faults = {
        "--images without --items|give the catalogue of these images": images is not None and options.items is None,
        "--download-images without --items|give both": options.download_images and options.items is None,
        "--allow-private-addresses without --download-images|give both": options.allow_private and not options.download_images,
        f"--session-gap {gap or 0:g} is not positive|give minutes": gap is not None and not gap > 0,
        f"--min-item-count {options.min_item_count} is not positive|1 keeps all items": options.min_item_count < 1,
        f"--max-session-length {longest} is negative|0 keeps all events": longest < 0,
        "--min-session-length is below 2 or above --max-session-length|give a length between": not lengths_fit,
        f"--on-bad-image {options.on_bad_image}|give {' or '.join(BAD_IMAGES)}": options.on_bad_image not in BAD_IMAGES,
    }
    for fault, made in faults.items():
        if made:
            raise UserError(fault.replace("|", " (command line); "), USAGE)
    if images is not None and not images.is_dir():
        raise UserError(f"image folder not found ({images}); give an existing folder", DATA)


def _write_items(path: Path, data: Database, columns: dict[str, str], images: ItemImages | None, summary: PrepareSummary) -> None:
    """Writes items.parquet, in small row groups, so that single images are quick to read."""
    wanted = images is not None and images.wanted
    links = images.links if images is not None else {}
    bare, writer = 0, None
    with ExitStack() as stack:
        steps = stack.enter_context(Steps("prepare", summary.items, show=wanted))
        for table in map(plain, data.batches(select_sql({**columns, **links}), GROUP_ROWS)):
            for piece in images.added_to(table, steps.advance) if images is not None and wanted else [table]:
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(path, piece.schema, compression="zstd", write_page_checksum=True))
                writer.write_table(piece)
                contents = [piece[name].is_null().to_numpy() for name in ("title", "description", "image") if name in piece.column_names]
                bare += np.logical_and.reduce(contents).sum()
        if images is not None and wanted:
            images.finish()
            summary.images = images.images
    if bare and images is not None:
        example = data.one("select item_id from items where title is null limit 1")[0]
        summary.say(f"warning: {bare:,} items have neither a text nor an image (e.g. {example!r}): only their ids can be learned")


def _write_sessions(path: Path, data: Database, sql: str, events: Events) -> None:
    done = 0
    with ExitStack() as stack:
        for table in data.batches(sql, SESSION_ROWS):
            table = _in_seconds(table, events, done)
            if not done:
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True))
            writer.write_table(table, row_group_size=SESSION_ROWS)
            done += len(table)


def _in_seconds(table: pa.Table, events: Events, done: int) -> pa.Table:
    """Returns the events with seconds instead of ticks or, without a time, numbered from `done` on."""
    if events.clock:
        seconds = np.floor_divide(table["timestamp"].to_numpy(), events.unit).astype(np.int64)
    else:
        seconds = np.arange(done, done + len(table))
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(seconds))
    return table.cast(pa.schema([(name, pa.int64() if name == "timestamp" else pa.string()) for name in table.column_names]))


def _preview(data: Database, columns: dict[str, str], sql: str, events: Events) -> list[str]:
    """Returns the first three items and sessions, as they would be written, as lines of text."""
    lines = []
    for row in plain(next(data.batches(f"{select_sql(columns)} limit 3", 3))).to_pylist():
        lines.append(f"item: {', '.join(f'{key}={str(value)[:60]!r}' for key, value in row.items() if value is not None)}")
    first: dict[str, list[str]] = {}
    for row in _in_seconds(next(data.batches(f"{sql} limit 1000", 1000)), events, 0).to_pylist():
        if len(first) < 3 or row["session_id"] in first:
            first.setdefault(row["session_id"], []).append(f"{row['item_id']} at {row['timestamp']}")
    return lines + [f"session {name!r}: {', '.join(steps[:8])}{' ...' if len(steps) > 8 else ''}" for name, steps in first.items()]
