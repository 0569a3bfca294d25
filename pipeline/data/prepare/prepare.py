"""Converts foreign catalogues and logs to `items.parquet` and `sessions.parquet`, the files every other step reads.

Unusable events are dropped and counted; a faulty item is an error, because a catalogue is expected to be correct. Items without an
event are kept: they are cold items. Images are copied into the file, so the folder is complete. A log without a catalogue gives
items that have nothing but ids.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.core.progress import Steps
from pipeline.data.availability import COLUMNS as AVAILABILITY
from pipeline.data.availability import read_availability
from pipeline.data.catalog import plain_text
from pipeline.data.data_folder import ITEMS, SESSIONS, publish_pair
from pipeline.data.images import ImageError, decode_image, read_image_file
from pipeline.data.parquet_checks import check_ids, has_binary, is_binary, is_image, is_text, raise_duplicate
from pipeline.data.prepare.sessionizer import SessionRules, build_sessions
from pipeline.data.prepare.tables import SourceTable, open_table
from pipeline.data.prepare.timestamps import read_times

ITEM_NAMES = {  # our column -> other names for it, in lower-case letters and digits only, the likeliest first
    "item_id": "itemid movieid productid articleid asin sku newsid bookid goodsid item product id",
    "title": "title name itemname productname producttitle itemtitle productdisplayname headline",
    "description": "description desc productdescription itemdescription plot overview",
    "image": "image img picture photo poster imagepath imagefile imagebytes",
    "available_from": "availablefrom",
    "available_until": "availableuntil",
}
EVENT_NAMES = {
    "session_id": "sessionid session sid visitid",
    "user_id": "userid user visitorid customerid memberid reviewerid uid",
    "item_id": ITEM_NAMES["item_id"].removesuffix(" id"),
    "timestamp": "timestamp time ts datetime eventtime unixtime unixreviewtime createdat date",
    "position": "position pos step sequence order",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
GROUP_ROWS, GROUP_BYTES = 1024, 16 * 1024 * 1024  # largest row group; random access to images reads whole groups


OnBadImage = Literal["error", "text_only"]


@dataclass(frozen=True)
class PrepareOptions:
    """The arguments of `tpad prepare`."""

    items: Path | None  # None: the items of the sessions, without content
    sessions: Path
    out: Path
    images: Path | None = None  # folder of files named item_id.jpg (.png, .webp), or to which the `image` column's paths are relative
    session_gap_minutes: float = 30.0  # a longer pause of a user starts a new session, if no column names sessions
    min_item_count: int = 1  # events of items with fewer events are dropped
    max_session_length: int = 0  # longest session in events, of which the last are kept; 0: no limit
    on_bad_image: OnBadImage = "error"
    columns: dict[str, str] = field(default_factory=dict)  # our column -> the file's


@dataclass
class PrepareSummary:
    """Counts of what was read, dropped and written."""

    out: Path
    items: int = 0
    cold: int = 0  # items without an event
    images: int = 0
    sessions: int = 0
    events: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
    notes: list[str] = field(default_factory=list)  # how the files were read

    def drop(self, reason: str, count: int) -> None:
        """Counts dropped rows."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + int(count)

    def lines(self) -> list[str]:
        """Returns the summary as lines of text."""
        read = [f"read: {note}" for note in self.notes]
        dropped = [f"dropped: {count:,} {reason}" for reason, count in self.dropped.items()]
        return [
            *read,
            *dropped,
            f"wrote: {self.items:,} items ({self.images:,} with an image, {self.cold:,} without an event) to {self.out / ITEMS}",
            f"wrote: {self.events:,} events in {self.sessions:,} sessions to {self.out / SESSIONS}",
        ]


def prepare(options: PrepareOptions) -> PrepareSummary:
    """Writes both files or, on any error, neither. Raises `UserError`."""
    _check(options)
    summary = PrepareSummary(options.out)
    items = open_table(options.items) if options.items is not None else None
    log = open_table(options.sessions)
    item_columns = _find_columns(items, ITEM_NAMES, options.columns, summary) if items is not None else {}
    event_columns = _find_columns(log, EVENT_NAMES, options.columns, summary)
    texts = _texts(items, item_columns, summary) if items is not None else None
    known = texts["item_id"] if texts is not None else log.ids(log.need(event_columns, "item_id"))
    rules = SessionRules(options.session_gap_minutes * 60, options.min_item_count, options.max_session_length)
    events = build_sessions(log, event_columns, known, rules, summary.drop, summary.notes.append)
    if texts is None:
        texts = pa.table({"item_id": (item_ids := events["item_id"].unique()), "title": pa.nulls(len(item_ids), pa.string())})
        check_ids(texts["item_id"], "item_id", lambda _: str(log.path))
    summary.events, summary.sessions = len(events), len(events["session_id"].unique())
    summary.cold = len(texts) - len(events["item_id"].unique())
    with publish_pair(options.out) as folder:
        _write_items(folder / ITEMS, texts, items or log, item_columns.get("image"), options, summary)
        pq.write_table(events, folder / SESSIONS, compression="zstd", write_page_checksum=True, row_group_size=2**20)
    return summary


def _check(options: PrepareOptions) -> None:
    unknown = options.columns.keys() - ITEM_NAMES.keys() - EVENT_NAMES.keys()
    if unknown:
        known = ", ".join(dict.fromkeys([*ITEM_NAMES, *EVENT_NAMES]))
        raise UserError(f"tpad has no column `{min(unknown)}` (--column); known: {known}", USAGE)
    if options.on_bad_image not in get_args(OnBadImage):
        raise UserError(f"--on-bad-image {options.on_bad_image} (command line); give {' or '.join(get_args(OnBadImage))}", USAGE)
    if options.images is not None and options.items is None:
        raise UserError("--images without --items (command line); give the catalogue of these images", USAGE)
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"image folder not found ({options.images}); give an existing folder", DATA)
    if not options.session_gap_minutes > 0 or options.min_item_count < 1 or options.max_session_length < 0:
        raise UserError("the session gap and the item count must be positive, the session length not negative (command line)", USAGE)


def _find_columns(source: SourceTable, names: dict[str, str], chosen: dict[str, str], summary: PrepareSummary) -> dict[str, str]:
    """Returns our column -> the file's: as chosen, else of the same name, else of another known name."""
    bare: dict[str, str] = {}
    for name in source.schema.names:
        bare.setdefault(re.sub("[^a-z0-9]", "", name.lower()), name)
    columns: dict[str, str] = {}
    for ours, others in names.items():
        theirs = chosen.get(ours)
        if theirs is not None and theirs not in source.schema.names:
            if ours != "item_id" or not any(other in bare for other in [ours, *others.split()]):  # item_id is in both files
                raise UserError(f"--column {ours}={theirs}: no such column ({source.path} has {source.some()}); give one of them", USAGE)
            theirs = None
        if theirs is None and ours in source.schema.names:
            theirs = ours
        theirs = theirs or next((bare[other] for other in others.split() if other in bare), None)
        if theirs is not None and theirs not in columns.values():
            columns[ours] = theirs
    renamed = ", ".join(f"`{theirs}` as {ours}" for ours, theirs in columns.items() if ours != theirs)
    summary.notes.append(f"{source.path}: {source.rows:,} rows" + (f", {renamed}" if renamed else ""))
    return columns


# --- items


def _texts(source: SourceTable, columns: dict[str, str], summary: PrepareSummary) -> pa.Table:
    """Reads every column of the items but the image."""
    if not source.rows:
        raise UserError(f"no items ({source.path}); a catalogue needs at least one row", DATA)
    item_ids = source.ids(source.need(columns, "item_id"))
    check_ids(item_ids, "item_id", source.where)
    if len(item_ids.unique()) < len(item_ids):
        raise_duplicate(item_ids.to_pylist(), source.where)
    table = {"item_id": item_ids, "title": _strings(source.column(source.need(columns, "title")))}
    if "description" in columns:
        table["description"] = _strings(source.column(columns["description"]))
    for name in AVAILABILITY:
        if name in columns:
            ticks, unit, known = read_times(source, columns[name], summary.notes.append)
            table[name] = pa.array(ticks // unit, pa.timestamp("s"), mask=~known)
    read_availability(source.path, pa.table({name: table[name] for name in AVAILABILITY if name in table}))
    for name, kind in zip(source.schema.names, source.schema.types, strict=True):
        if name in columns.values():
            continue
        if not name or name in ITEM_NAMES or has_binary(kind) or pa.types.is_null(kind):
            summary.notes.append(f"{source.path}: column `{name}` left out")
            continue
        values = source.column(name)
        table[name] = values.cast(kind.value_type) if pa.types.is_dictionary(kind) else values
    return pa.table(table)


def _strings(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if is_text(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.string())
    return pa.chunked_array([[plain_text(value.as_py()) for value in values]], pa.string())


def _image_files(folder: Path | None) -> dict[str, str]:
    """Returns item_id -> name of its file in the image folder."""
    names: dict[str, str] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix.lower(), path.name)) if folder else ():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            names.setdefault(path.stem, path.name)
    return names


def _images(source: SourceTable, name: str | None, files: dict[str, str], item_ids: list[str]) -> Iterator[tuple[bytes | None, str | None]]:
    """Yields bytes or path of each item's image: of the column, else of the file named after the item."""
    kind = source.schema.field(name).type if name else pa.null()
    if not (is_binary(kind) or is_image(kind) or is_text(kind) or pa.types.is_null(kind)):
        raise UserError(f"column `{name}` has the wrong type, {kind} ({source.path}); images are bytes or relative paths", DATA)
    values = source.values(name) if name else iter([None] * len(item_ids))
    for item_id, value in zip(item_ids, values, strict=True):
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
        else:
            data, path = (None, value.strip()) if isinstance(value, str) else (value, None)
        yield data or None, path or files.get(item_id)


def _write_items(
    path: Path, texts: pa.Table, source: SourceTable, image: str | None, options: PrepareOptions, summary: PrepareSummary
) -> None:
    """Writes items.parquet, in small row groups, so that single images are quick to read."""
    summary.items = len(texts)
    if image is None and options.images is None:
        pq.write_table(texts, path, row_group_size=GROUP_ROWS, compression="zstd", write_page_checksum=True)
        return
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    item_ids = texts["item_id"].to_pylist()
    files = _image_files(options.images)
    waiting: list[bytes | None] = []
    size = 0
    schema = texts.schema.append(pa.field("image", kind))
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer, Steps("prepare", len(item_ids)) as steps:
        for row, (data, link) in enumerate(_images(source, image, files, item_ids)):
            waiting.append(_checked_image(data, link, source, row, options, summary))
            size += len(waiting[-1] or b"")
            if row + 1 == len(item_ids) or len(waiting) == GROUP_ROWS or size > GROUP_BYTES:
                column = pa.array([data and {"bytes": data, "path": None} for data in waiting], kind)
                writer.write_table(texts.slice(row + 1 - len(waiting), len(waiting)).append_column("image", column))
                summary.images += len(waiting) - column.null_count
                waiting, size = [], 0
            steps.advance()
    if image is None:
        summary.drop(f"image files that no item_id names ({options.images})", len(files.keys() - set(item_ids)))


def _checked_image(
    data: bytes | None, link: str | None, source: SourceTable, row: int, options: PrepareOptions, summary: PrepareSummary
) -> bytes | None:
    """Returns the bytes of an image, decoded once so that a bad one is found before the long steps."""
    try:
        if data is None and link is not None:
            data = read_image_file(options.images or source.path.parent, link, source.where(row))
        if data is not None:
            decode_image(data, source.where(row))
        return data
    except ImageError:
        if options.on_bad_image == "error":
            raise
        summary.drop("images that cannot be decoded", 1)
        return None
