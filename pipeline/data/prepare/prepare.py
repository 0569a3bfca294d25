"""Converts foreign catalogues and logs to `items.parquet` and `sessions.parquet`, the files every other step reads.

Unusable events are dropped and counted; a faulty item is an error, because a catalogue is expected to be correct. Items without an
event are kept: they are cold items. Images are copied into the file, so the folder is complete. A log without a catalogue gives
items that have nothing but ids.
"""

from collections.abc import Iterator
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
from pipeline.data.prepare.item_images import KIND, ItemImages
from pipeline.data.prepare.items import load_items, plain, select_sql
from pipeline.data.prepare.open_tables import open_tables
from pipeline.data.prepare.sessionizer import build_sessions
from pipeline.data.prepare.table_options import Paths, Report, TableOptions

LINK = "__link"  # column of the paths and addresses of images, which is not written
GROUP_ROWS, GROUP_BYTES = 1024, 16 * 1024 * 1024  # largest row group; random access to images reads whole groups
SESSION_ROWS = 2**20  # rows of a row group of sessions.parquet
PREVIEW_ROWS = 200_000  # rows of each file that a preview reads

OnBadImage = Literal["error", "text_only"]


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
    tables = options.table
    with database(options.out, tables.memory) as data:
        log, items = open_tables(data, options.sessions, options.items, tables, summary)
        result = load_items(data, items, limit, summary.say) if items is not None else {}
        downloads = Downloads(options.out / "images-cache", options.allow_private) if options.download_images else None
        images = (
            ItemImages(items, options.images, options.on_bad_image, downloads, summary.say, summary.drop) if items is not None else None
        )
        gap = None if options.session_gap_minutes is None else options.session_gap_minutes * 60
        rules = SessionRules(gap, options.min_item_count, options.min_session_length, options.max_session_length, options.collapse_repeats)
        events = load_events(data, log, rules, tables, summary, limit)
        sql = build_sessions(events, items is not None, rules)
        if items is None:
            data.run(
                "create table items as select known.id as item_id, cast(null as varchar) as title from known join (select i, min(p) as "
                "first from kept join sessions s on s.k = kept.k and s.n = kept.n group by i) f on f.i = known.i order by first"
            )
            result = {"item_id": "item_id", "title": "title"}
        summary.sessions, summary.events = data.one("select count(*), sum(length) from sessions")
        used = data.one("select count(distinct i) from kept join sessions s on s.k = kept.k and s.n = kept.n")[0]
        summary.items = data.one("select count(*) from items")[0]
        summary.cold = summary.items - used
        if options.dry_run:
            summary.preview = _preview(data, result, sql, events)
            return summary
        if images is not None and images.link:
            links = data.rows(f"select {images.link} from items where {images.link} is not null order by rowid")
            images.fetch(link for (link,) in links)
        with publish_pair(options.out) as folder:
            _write_items(folder / ITEMS, data, result, images, summary)
            _write_sessions(folder / SESSIONS, data, sql, events)
    return summary


def _check(options: PrepareOptions) -> None:
    if options.on_bad_image not in get_args(OnBadImage):
        raise UserError(f"--on-bad-image {options.on_bad_image} (command line); give {' or '.join(get_args(OnBadImage))}", USAGE)
    if options.images is not None and options.items is None:
        raise UserError("--images without --items (command line); give the catalogue of these images", USAGE)
    if (options.download_images and options.items is None) or (options.allow_private and not options.download_images):
        fault = "--download-images without --items" if options.download_images else "--allow-private-addresses without --download-images"
        raise UserError(f"{fault} (command line); give both", USAGE)
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"image folder not found ({options.images}); give an existing folder", DATA)
    gap = options.session_gap_minutes
    if gap is not None and not gap > 0:
        raise UserError(f"--session-gap {gap:g} is not positive (command line); give minutes", USAGE)
    if options.min_item_count < 1:
        raise UserError(f"--min-item-count {options.min_item_count} is not positive (command line); 1 keeps all items", USAGE)
    if options.max_session_length < 0:
        raise UserError(f"--max-session-length {options.max_session_length} is negative (command line); 0 keeps all events", USAGE)
    if options.min_session_length < 2 or 0 < options.max_session_length < options.min_session_length:
        raise UserError("--min-session-length is 2 or more, and not above --max-session-length (command line)", USAGE)


def _write_items(path: Path, data: Database, result: dict[str, str], images: ItemImages | None, summary: PrepareSummary) -> None:
    """Writes items.parquet, in small row groups, so that single images are quick to read."""
    wanted = images is not None and images.wanted
    link = {LINK: images.link} if wanted and images is not None and images.link else {}
    tables = data.batches(select_sql(result, link), GROUP_ROWS)
    first = plain(next(tables))
    schema = first.schema if not wanted else pa.schema([*(one for one in first.schema if one.name != LINK), pa.field("image", KIND)])
    bare = 0
    with (
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer,
        Steps("prepare", summary.items, show=wanted) as steps,
    ):

        def rows() -> Iterator[pa.Table]:
            yield first
            yield from map(plain, tables)

        if not wanted or images is None:
            for table in rows():
                bare += _without_text(table).sum()
                writer.write_table(table)
                steps.advance(by=len(table))
        else:
            bare = _write_with_images(writer, rows(), images, summary, steps)
            images.finish(str(first["item_id"][0]))
    if bare and images is not None:
        example = data.one("select item_id from items where title is null limit 1")[0]
        summary.say(f"warning: {bare:,} items have neither a text nor an image (e.g. {example!r}): only their ids can be learned")


def _without_text(table: pa.Table) -> np.ndarray:
    """Returns (n,) bool: items without title and description."""
    bare = np.ones(len(table), bool)
    for column in ("title", "description"):
        if column in table.column_names:
            bare &= table[column].is_null().to_numpy()
    return bare


def _write_with_images(
    writer: pq.ParquetWriter, tables: Iterator[pa.Table], images: ItemImages, summary: PrepareSummary, steps: Steps
) -> int:
    bare = 0
    waiting: list[bytes | None] = []
    kept: list[pa.Table] = []

    def ids() -> Iterator[tuple[str, str | None]]:
        for table in tables:
            links = table[LINK].to_pylist() if LINK in table.column_names else [None] * len(table)
            kept.append(table.drop_columns(LINK) if LINK in table.column_names else table)
            yield from zip(table["item_id"].to_pylist(), links, strict=True)

    size = done = 0
    for data in images.read(ids()):
        waiting.append(data)
        size += len(data or b"")
        steps.advance()
        if len(waiting) + done == len(kept[0]) or size > GROUP_BYTES:
            column = pa.array([data and {"bytes": data, "path": None} for data in waiting], KIND)
            table = kept[0].slice(done, len(waiting))
            writer.write_table(table.append_column("image", column))
            summary.images += len(waiting) - column.null_count
            bare += int((_without_text(table) & column.is_null().to_numpy(zero_copy_only=False)).sum())
            done, waiting, size = done + len(waiting), [], 0
            if done == len(kept[0]):
                kept.pop(0)
                done = 0
    return bare


def _write_sessions(path: Path, data: Database, sql: str, events: Events) -> None:
    kinds = {"timestamp": pa.int64()}
    writer, done = None, 0
    try:
        for table in data.batches(sql, SESSION_ROWS):
            schema = pa.schema([(name, kinds.get(name, pa.string())) for name in table.column_names])
            table = _seconds(table, events, done).cast(schema)
            writer = writer or pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table, row_group_size=SESSION_ROWS)
            done += len(table)
    finally:
        if writer is not None:
            writer.close()


def _seconds(table: pa.Table, events: Events, done: int) -> pa.Table:
    """Returns the events with seconds instead of ticks or, without a time, numbered from `done` on."""
    ticks = table["timestamp"].to_numpy()
    seconds = np.floor_divide(ticks, events.unit) if events.timed else np.arange(done, done + len(table))
    return table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(seconds.astype(np.int64)))


def _preview(data: Database, result: dict[str, str], sql: str, events: Events) -> list[str]:
    """Returns the first three items and sessions, as they would be written, as lines of text."""
    lines = []
    for table in data.batches(f"{select_sql(result, {})} limit 3", 3):
        lines += [
            f"item: {', '.join(f'{key}={str(value)[:60]!r}' for key, value in row.items() if value is not None)}"
            for row in plain(table).to_pylist()
        ]
    first: dict[str, list[str]] = {}
    for row in _seconds(next(data.batches(f"{sql} limit 1000", 1000)), events, 0).to_pylist():
        if len(first) < 3 or row["session_id"] in first:
            first.setdefault(row["session_id"], []).append(f"{row['item_id']} at {row['timestamp']}")
    return lines + [f"session {name!r}: {', '.join(steps[:8])}{' ...' if len(steps) > 8 else ''}" for name, steps in first.items()]
