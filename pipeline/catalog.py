"""Items and sessions of a data folder: read, check, decode images safely.

`items.parquet` and `sessions.parquet` are what users and `tpad prepare` hand over, so everything about them is checked
here, once, and a fault is one line with file and row. Texts are held in memory, unless the catalogue is loaded to be
streamed; images are not: they are read by row group through a cache of limited size, so a catalogue may be larger than
memory (row groups of gigabytes will be felt, though).
"""

import hashlib
import io
import math
import os
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.artifact import sha256_file
from pipeline.errors import DATA, UserError

ITEMS, SESSIONS = "items.parquet", "sessions.parquet"
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ID_BYTES = 512
MAX_IMAGE_BYTES = 20 * 1024 * 1024
MAX_IMAGE_PIXELS = 40_000_000
MAX_SIDE = 4096  # pixels; a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which costs nothing
CACHE_BYTES = 256 * 1024 * 1024  # of image row groups ...
STREAM_BYTES = 16 * 1024 * 1024  # ... and of the columns of a catalogue that is gone through once, in order
MILLISECONDS = 10**11  # a timestamp above is not in seconds (that would be the year 5138) ...
MICROSECONDS = 10**14  # ... and one above this is not in milliseconds either
CONTROL = "[\\x00-\\x1f\\x7f\\x{80}-\\x{9f}\\x{2028}\\x{2029}]"  # in the syntax of RE2, which Arrow uses
PREPARE = "`tpad prepare` writes such a file"


# --- images


def decode_image(data: bytes, where: str) -> Image.Image:
    """A JPEG, PNG or WebP as RGB: first frame, upright, transparency on white. Anything odd is a `UserError` (3) at `where`."""
    if len(data) > MAX_IMAGE_BYTES:
        raise _bad_image(f"{len(data) / 1e6:.0f} MB, more than {MAX_IMAGE_BYTES // 2**20} MB are not read", where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about odd metadata, which is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise _bad_image(f"{image.width} x {image.height} pixels, too large to decode safely", where)
                shrink = 2 ** max(0, (max(image.size) - 1).bit_length() - MAX_SIDE.bit_length() + 1)
                if shrink > 1:
                    image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
                image.load()
                return _rgb(_upright(image))
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _bad_image("too many pixels to decode safely", where) from None
    except UnidentifiedImageError:
        raise _bad_image("not a JPEG, PNG or WebP", where) from None
    except Exception as error:  # hostile bytes make the decoders raise almost anything
        raise _bad_image(f"damaged: {error or type(error).__name__}", where) from None


def _bad_image(what: str, where: str) -> UserError:
    way_out = "replace it, or set data.on_bad_image (of `tpad prepare`: --on-bad-image) to text_only"
    return UserError(f"image cannot be used: {what} ({where}); {way_out}", DATA)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the picture itself is sound; only its orientation tag cannot be read
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, layer).convert("RGB")
    return image.convert("RGB")


def read_image_file(folder: Path, path: str, where: str) -> bytes:
    """The bytes of an image named relative to `folder`, which the path and its links may not leave."""
    parts = PurePosixPath(path)
    if "://" in path or "\\" in path or "\0" in path or parts.is_absolute() or ".." in parts.parts:
        raise _bad_image(f"path {path[:100]!r} is not relative and inside the folder of the items", where)
    try:
        root = folder.resolve(strict=True)
        target = (root / parts).resolve(strict=True)
        if not target.is_relative_to(root) or not target.is_file():
            raise _bad_image(f"path {path[:100]!r} leads out of the folder of the items, or to no plain file", where)
        with target.open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, RuntimeError) as error:
        raise _bad_image(f"{getattr(error, 'strerror', None) or error}: {path[:100]!r}", where) from None


class _Column:
    """A column of a Parquet file, read by row group, the last few kept."""

    def __init__(self, path: Path, file: pq.ParquetFile, name: str, cache_bytes: int) -> None:
        self.path, self.metadata, self.name, self.cache_bytes = path, file.metadata, name, cache_bytes
        self.ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]).tolist()
        self.kept: dict[int, pa.ChunkedArray] = {}  # in order of use
        self.state = _file_state(path)

    def __getitem__(self, row: int) -> pa.Scalar:
        group = bisect_right(self.ends, row)
        return self._group(group)[row - (self.ends[group - 1] if group else 0)]

    def _group(self, number: int) -> pa.ChunkedArray:
        column = self.kept.pop(number, None)
        if column is None:
            if _file_state(self.path) != self.state:
                raise UserError(f"the items changed while in use ({self.path}); start the command again", DATA)
            try:
                column = _open(self.path, self.metadata).read_row_group(number, columns=[self.name], use_threads=False).column(0)
                column.validate(full=True)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(self.path, error) from None
            room = self.cache_bytes - column.nbytes
            while self.kept and sum(kept.nbytes for kept in self.kept.values()) > room:
                self.kept.pop(next(iter(self.kept)), None)
        self.kept[number] = column
        return column


def _file_state(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _present(file: pq.ParquetFile, folder: Path) -> tuple[np.ndarray, bytes]:
    """(N,) bool: which items have an image; and of those that are files of their own the paths and sizes."""
    present, linked = [np.zeros(0, bool)], []
    for batch in file.iter_batches(1024, columns=["image"], use_threads=False):
        images = batch.column(0)
        held, named = _filled(images, "bytes"), _filled(images, "path")
        present.append(held | named)
        alone = pc.struct_field(images, "path").filter(pa.array(named & ~held)) if (named & ~held).any() else []
        linked += [f"{path} {_size(folder / str(path))}\n".encode() for path in alone]
    return np.concatenate(present), b"".join(linked)


def _size(path: Path) -> int:
    """In bytes; -1 where there is no such file."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _filled(images: pa.StructArray, name: str) -> np.ndarray:
    at = images.type.get_field_index(name)
    if at < 0 or pa.types.is_null(images.type.field(at).type):
        return np.zeros(len(images), bool)
    length = pc.binary_length(pc.struct_field(images, name))
    filled: np.ndarray = pc.fill_null(pc.greater(length, 0), False).to_numpy(zero_copy_only=False)
    return filled


# --- items


@dataclass
class Catalog:
    """The items in file order: `row` of an item is its position there, `item_id` the user's name for it."""

    path: Path
    sha256: str  # of the file, and of the sizes of pictures beside it
    item_ids: list[str]
    columns: list[str]  # those with a text: every one but item_id, image and other binary ones
    _texts: Mapping[str, pa.Array | _Column] = field(repr=False)
    _images: _Column | None = field(repr=False)
    _present: np.ndarray = field(repr=False)  # (N,) bool: who has an image
    by_path: bool = False  # some images are files beside the catalogue, of which its sha256 knows no more than the size

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def row(self) -> dict[str, int]:
        """item_id -> row"""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def titles(self) -> list[str]:
        return [self.text(row, "title") for row in range(len(self))]

    def only(self, item_ids: list[str]) -> "Catalog":
        """These of the items, in this order, with their texts and no image. Not of a catalogue that is streamed."""
        rows = pa.array([self.row[item] for item in item_ids], pa.int64())
        texts = {name: column.take(rows) for name, column in self._texts.items() if isinstance(column, pa.Array)}
        return replace(self, item_ids=item_ids, _texts=texts, _images=None, _present=np.zeros(len(item_ids), bool))

    def attributes(self) -> dict[str, pa.Array]:
        """What items can be told apart by, all but title and description: a text each, or a list of texts. Not of a streamed one."""
        found = {}
        for name in self.columns:
            column = self._texts[name]
            if name not in ("title", "description") and isinstance(column, pa.Array):
                if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                    texts = [[text for text in map(plain_text, values or []) if text] for values in column.to_pylist()]
                    found[name] = pa.array(texts, pa.list_(pa.string()))
                else:
                    found[name] = pa.array([plain_text(value) or None for value in column.to_pylist()], pa.string())
        return found

    def text(self, row: int, column: str) -> str:
        return plain_text(self._texts[column][row].as_py())

    def has_image(self, row: int) -> bool:
        return bool(self._present[row])

    def image_bytes(self, row: int) -> bytes | None:
        if self._images is None or not self._present[row]:
            return None
        record = self._images[row].as_py()
        data, path = record.get("bytes"), record.get("path") or None
        return data if data or path is None else read_image_file(self.path.parent, path, self._where(row))

    def image_size(self, row: int) -> tuple[int, int]:
        """Width and height by the file's first bytes; (0, 0) where these say nothing."""
        try:
            with Image.open(io.BytesIO(self.image_bytes(row) or b""), formats=FORMATS) as image:
                return image.size
        except Exception:  # `image` has the words for it
            return 0, 0

    def image(self, row: int) -> Image.Image | None:
        """None without an image; `UserError` (3) for one that cannot be decoded."""
        data = self.image_bytes(row)
        return None if data is None else decode_image(data, self._where(row))

    def _where(self, row: int) -> str:
        return f"{self.path} row {row}, item_id {self.item_ids[row]!r}"


def plain_text(value: Any) -> str:
    """An attribute as a person would write it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text}" for key, text in ((key, plain_text(part)) for key, part in value.items()) if text)
    if isinstance(value, (list, tuple)):
        return ", ".join(text for text in map(plain_text, value) if text)
    return str(value)


def load_catalog(data: Path, stream: bool = False) -> Catalog:
    """The items of a data folder. With `stream` little but the item_ids is held in memory: for one pass in row order."""
    path = data / ITEMS
    file = open_parquet(path, f"give a folder with {ITEMS} and {SESSIONS}, e.g. from `tpad prepare`")
    schema = file.schema_arrow
    need_columns(path, schema, {"item_id": is_text, "title": lambda kind: is_text(kind) or pa.types.is_null(kind)})
    images = "image" in schema.names
    if images:
        need_columns(path, schema, {"image": is_image})
    columns = [f.name for f in schema if f.name not in ("item_id", "image") and not has_binary(f.type)]
    cache_bytes = STREAM_BYTES if stream else CACHE_BYTES
    try:
        sha256 = sha256_file(path)
        table = file.read(columns=["item_id"] if stream else ["item_id", *columns], use_threads=False)
        table.validate(full=True)
        present, linked = _present(file, path.parent) if images else (np.zeros(len(table), bool), b"")
        image_column = _Column(path, file, "image", cache_bytes) if images else None
        streamed = {name: _Column(path, file, name, cache_bytes) for name in columns} if stream else {}
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    if not len(table):
        raise UserError(f"no items ({path}); a catalogue needs at least one row", DATA)
    check_ids(table["item_id"], "item_id", lambda row: f"{path} row {row}")
    item_ids = table["item_id"].to_pylist()
    if len(set(item_ids)) < len(item_ids):
        raise_duplicate(item_ids, lambda row: f"{path} row {row}")
    texts = streamed or {name: table[name].combine_chunks() for name in columns}
    if linked:
        sha256 = hashlib.sha256(sha256.encode() + linked).hexdigest()
    return Catalog(path, sha256, item_ids, columns, texts, image_column, present, bool(linked))


def raise_duplicate(item_ids: list[str], where: Callable[[int], str]) -> None:
    first: dict[str, int] = {}
    for row, item_id in enumerate(item_ids):
        if item_id in first:
            raise UserError(f"item_id {item_id!r} stands twice ({where(row)} and {where(first[item_id])}); keep one of them", DATA)
        first[item_id] = row


# --- what any Parquet file of ours must be


def open_parquet(path: Path, hint: str) -> pq.ParquetFile:
    if not path.is_file():
        raise UserError(f"{path.name} not found ({path}); {hint}", DATA)
    try:
        return _open(path, None)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def _open(path: Path, metadata: Any) -> pq.ParquetFile:
    # without pre_buffer, which would hold all row groups that were read
    return pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True, pre_buffer=False, buffer_size=2**20)


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"not readable as Parquet: {str(error).rstrip('.')[:200]} ({path}); write the file again", DATA)


def need_columns(path: Path, schema: pa.Schema, wanted: dict[str, Any]) -> None:
    """`wanted`: column -> test of its Arrow type."""
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UserError(f"column `{name}` stands twice ({path}); keep one", DATA)
    for name, fits in wanted.items():
        if name not in schema.names:
            raise UserError(f"column `{name}` is missing ({path} has {', '.join(schema.names[:20])}); {PREPARE}", DATA)
        if not fits(schema.field(name).type):
            raise UserError(f"column `{name}` has the wrong type, {schema.field(name).type} ({path}); {PREPARE}", DATA)


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_image(kind: pa.DataType) -> bool:
    """struct<bytes: binary, path: string>, either of which may be absent."""
    if not pa.types.is_struct(kind):
        return False
    parts = {part.name: part.type for part in kind}
    fits = {"bytes": is_binary, "path": is_text}
    return bool(parts) and all(name in fits and (fits[name](part) or pa.types.is_null(part)) for name, part in parts.items())


def is_clock(kind: pa.DataType) -> bool:
    return bool((pa.types.is_integer(kind) and kind != pa.uint64()) or pa.types.is_timestamp(kind))


def has_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return is_binary(kind.value_type)
    nested = [kind.field(i).type for i in range(kind.num_fields)]
    return is_binary(kind) or bool(pa.types.is_fixed_size_binary(kind)) or any(has_binary(part) for part in nested)


def check_ids(ids: pa.ChunkedArray, name: str, where: Callable[[int], str]) -> None:
    ids = ids.cast(pa.large_string())
    faults = {
        "is empty": pc.fill_null(pc.equal(pc.binary_length(pc.utf8_trim_whitespace(ids)), 0), True),
        f"is longer than {MAX_ID_BYTES} bytes": pc.fill_null(pc.greater(pc.binary_length(ids), MAX_ID_BYTES), False),
        "has a control character": pc.fill_null(pc.match_substring_regex(ids, CONTROL), False),
    }
    for fault, bad in faults.items():
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise UserError(f"{name} {fault} ({where(row)}); every row needs a short, printable {name}", DATA)


# --- sessions


@dataclass(frozen=True)
class SessionLog:
    """Sessions of two events or more, by (start, session_id); inside a session by (timestamp, row of the file)."""

    session_ids: list[str]
    rows: np.ndarray  # (E,) int32, the items' rows, session after session
    offsets: np.ndarray  # (S + 1,) int64, where each session begins
    start: np.ndarray  # (S,) int64 seconds
    dropped: int = 0  # sessions of one event, left out: nothing follows in them
    users: list[str] = field(default_factory=list)  # (S,) whose each is, where the file says so; else empty
    last_out: bool = False  # a part of the protocol last-out: held out is the last item of each session, not the session

    def __len__(self) -> int:
        return len(self.session_ids)

    def session(self, i: int) -> np.ndarray:
        rows: np.ndarray = self.rows[self.offsets[i] : self.offsets[i + 1]]
        return rows

    def select(self, which: np.ndarray) -> "SessionLog":
        """The sessions at the positions `which`, in that order."""
        which = np.asarray(which, dtype=np.int64)
        lengths = np.diff(self.offsets)[which]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[which] - offsets[:-1], lengths)
        return replace(self._named(which), rows=self.rows[events], offsets=offsets, dropped=0)

    def keep(self, events: np.ndarray) -> "SessionLog":
        """With these events (E,) bool alone; a session that keeps fewer than two goes. ValueError where none is left."""
        lengths = np.diff(self.offsets)
        count = np.bincount(np.repeat(np.arange(len(self)), lengths)[events], minlength=len(self))
        which = np.flatnonzero(count >= 2)
        if not len(which):
            raise ValueError("no session of two events")
        offsets = np.concatenate([[0], np.cumsum(count[which])]).astype(np.int64)
        return replace(self._named(which), rows=self.rows[events & np.repeat(count >= 2, lengths)], offsets=offsets)

    def moved(self, place: np.ndarray, training: bool = False) -> "SessionLog":
        """With the items' new rows `place` (N,), without the events of those at -1; whether this is the part for training. ValueError
        where no session is left."""
        rows = place[self.rows].astype(np.int32)
        kept = rows >= 0
        if self.last_out and not training:  # another last item in its place would be one that was trained on
            kept &= np.repeat(kept[self.offsets[1:] - 1], np.diff(self.offsets))
        return replace(self, rows=rows).keep(kept)

    def _named(self, which: np.ndarray) -> "SessionLog":
        """What is known of the sessions `which`, beside their events."""
        names, users = ([of[i] for i in which] if of else [] for of in (self.session_ids, self.users))
        return replace(self, session_ids=names, users=users, start=self.start[which])

    def ids_sha256(self) -> str:
        digest = hashlib.sha256(b"last-out" if self.last_out else b"")  # there the ids do not tell what of a session was seen
        for session_id in sorted(self.session_ids):
            text = session_id.encode()
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()


def load_sessions(data: Path, catalog: Catalog) -> SessionLog:
    path = data / SESSIONS
    schema = open_parquet(path, f"give a folder with {ITEMS} and {SESSIONS}, e.g. from `tpad prepare`").schema_arrow
    need_columns(path, schema, {"session_id": is_text, "item_id": is_text, "timestamp": is_clock})
    users = "user_id" in schema.names
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
    clock, unit = event_clock(path, table["timestamp"])
    return _sessions(path, session, session_ids, rows, clock, unit, table["user_id"] if users else None)


def _codes(path: Path, column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, list[str]]:
    """(E,) position of each value in the list of the distinct ones."""
    check_ids(column, name, lambda row: f"{path} row {row}")
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    whole = encoded.unify_dictionaries().combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return whole.indices.to_numpy().astype(np.int64), whole.dictionary.to_pylist()


def event_clock(path: Path, column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """(E,) int64 times, and how many of their units make a second."""
    row = pc.index(pc.is_null(column), True).as_py()
    if row >= 0:
        raise UserError(f"timestamp is empty ({path} row {row}); every event needs one", DATA)
    if pa.types.is_timestamp(column.type):
        unit = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
        return column.cast(pa.int64()).to_numpy().astype(np.int64), unit
    clock = column.cast(pa.int64()).to_numpy().astype(np.int64)
    if clock.max() >= MICROSECONDS:
        raise UserError(f"timestamp is neither in seconds nor in milliseconds ({path} row {clock.argmax()}); {PREPARE}", DATA)
    if clock.max() < MILLISECONDS:
        return clock, 1
    if clock.min() < MILLISECONDS // 10:  # 1970-04 in milliseconds: rather a time in seconds
        raise UserError(f"timestamps are partly in seconds, partly in milliseconds ({path} row {clock.argmin()}); use one unit", DATA)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: timestamps of {path} are read as milliseconds", file=sys.stderr)
    return clock, 1000


def _sessions(
    path: Path, session: np.ndarray, ids: list[str], rows: np.ndarray, clock: np.ndarray, unit: int, user: pa.ChunkedArray | None
) -> SessionLog:
    count = np.bincount(session, minlength=len(ids))
    start = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(start, session, clock)
    kept = np.flatnonzero(count >= 2)
    if not len(kept):
        raise UserError(f"no session has two events ({path}, {len(ids)} sessions); check that session_id groups events", DATA)
    order = pa.table({"start": start[kept], "id": [ids[i] for i in kept], "session": kept})
    order = order.sort_by([("start", "ascending"), ("id", "ascending")])
    sessions = order["session"].to_numpy()
    rank = np.full(len(ids), -1)
    rank[sessions] = np.arange(len(sessions))
    events = np.flatnonzero(rank[session] >= 0)
    events = events[np.lexsort((clock[events], rank[session[events]]))]  # stable: equal times stay in file order
    offsets = np.concatenate([[0], np.cumsum(count[sessions])]).astype(np.int64)
    names = order["id"].to_pylist()
    users = [] if user is None else user.take(events[offsets[:-1]]).to_pylist()  # of the first event
    users = [whose or name for whose, name in zip(users, names, strict=False)]
    return SessionLog(names, rows[events], offsets, start[sessions] // unit, int(len(ids) - len(kept)), users)
