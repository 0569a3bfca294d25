"""Loads and checks the items of a data folder.

`items.parquet` comes from users or `tpad prepare`, so it is checked completely here, and an error is one line with file and row (as
in `session_log.py` for the sessions). Texts are held in memory, unless the catalogue is loaded as a stream. Images are not: they are
read by row group through a cache of limited size, so a catalogue may be larger than memory (but row groups of gigabytes are slow).
"""

import hashlib
import io
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.errors import DATA, UserError
from pipeline.core.files import sha256_file
from pipeline.data.availability import COLUMNS as AVAILABILITY
from pipeline.data.availability import Availability, read_availability
from pipeline.data.data_folder import ITEMS, SESSIONS, data_file
from pipeline.data.images import FORMATS, decode_image, read_image_file
from pipeline.data.parquet_checks import (
    check_ids,
    has_binary,
    inner,
    is_image,
    is_text,
    need_columns,
    open_parquet,
    parquet_file,
    raise_duplicate,
    unreadable,
)

CACHE_BYTES = 256 * 1024 * 1024  # cache of image row groups ...
STREAM_BYTES = 16 * 1024 * 1024  # ... and of each column of a streamed catalogue, which is read once, in order


class _Column:
    """A column of a Parquet file, read by row group; the last few groups are cached."""

    def __init__(self, path: Path, file: pq.ParquetFile, name: str, cache_bytes: int) -> None:
        self.path, self.metadata, self.name, self.cache_bytes = path, file.metadata, name, cache_bytes
        self.ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]).tolist()
        self.cached: dict[int, pa.ChunkedArray] = {}  # in order of use
        self.state = file_state(path)

    def __getitem__(self, row: int) -> pa.Scalar:
        group = bisect_right(self.ends, row)
        return self._group(group)[row - (self.ends[group - 1] if group else 0)]

    def _group(self, number: int) -> pa.ChunkedArray:
        column = self.cached.pop(number, None)
        if column is None:
            check_unchanged(self.path, self.state)
            try:
                column = parquet_file(self.path, self.metadata).read_row_group(number, columns=[self.name], use_threads=False).column(0)
                column.validate(full=True)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(self.path, error) from None
            room = self.cache_bytes - column.nbytes
            while self.cached and sum(group.nbytes for group in self.cached.values()) > room:
                self.cached.pop(next(iter(self.cached)), None)
        self.cached[number] = column
        return column


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Returns what changes when the file is replaced; None where there is no such file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def check_unchanged(path: Path, state: tuple[int, int, int] | None) -> None:
    """Raises `UserError` (3) unless the items are still those that were read: sessions and images of others would be a mixture."""
    if file_state(path) != state:
        raise UserError(f"the items changed while in use ({path}); start the command again", DATA)


def _present(file: pq.ParquetFile, folder: Path) -> tuple[np.ndarray, bytes]:
    """Returns (N,) bool, which items have an image, and the paths and sizes of images in separate files."""
    present, linked = [np.zeros(0, bool)], []
    for batch in file.iter_batches(1024, columns=["image"], use_threads=False):
        images = batch.column(0)
        embedded, named = _filled(images, "bytes"), _filled(images, "path")
        present.append(embedded | named)
        paths = pc.struct_field(images, "path").filter(pa.array(named & ~embedded)) if (named & ~embedded).any() else []
        linked += [f"{path} {_size(folder / str(path))}\n".encode() for path in paths]
    return np.concatenate(present), b"".join(linked)


def _addresses(file: pq.ParquetFile, name: str) -> bool:
    """Returns whether most of the first values of a column are addresses in the web, from which nothing is learned."""
    column = next(file.iter_batches(1024, columns=[name], use_threads=False)).column(0)
    values = pc.list_flatten(column) if inner(column.type) != column.type else column
    values = values.drop_null().cast(pa.large_string())
    found = pc.sum(pc.match_substring_regex(values, "^(https?://|\\{.*https?://)")).as_py() or 0
    return bool(found * 2 > len(values))


def _size(path: Path) -> int:
    """Returns the size in bytes; -1 where there is no such file."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _filled(images: pa.StructArray, name: str) -> np.ndarray:
    """Returns (n,) bool: where the field `name` is not empty."""
    index = images.type.get_field_index(name)
    if index < 0 or pa.types.is_null(images.type.field(index).type):
        return np.zeros(len(images), bool)
    length = pc.binary_length(pc.struct_field(images, name))
    filled: np.ndarray = pc.fill_null(pc.greater(length, 0), False).to_numpy(zero_copy_only=False)
    return filled


# --- items


@dataclass
class Catalog:
    """The items in file order. `row` of an item is its position there, `item_id` the user's name for it."""

    path: Path
    sha256: str  # of the file, and of the sizes of image files beside it
    item_ids: list[str]
    columns: list[str]  # columns that can be read as text: all but item_id, image, availability and binary ones
    text_columns: list[str]  # of these, columns of texts or lists of texts, but not of addresses in the web
    _texts: Mapping[str, pa.Array | _Column] = field(repr=False)
    _images: _Column | None = field(repr=False)
    _present: np.ndarray = field(repr=False)  # (N,) bool: which items have an image
    availability: Availability | None = None  # None: every item may always be recommended
    state: tuple[int, int, int] | None = None  # of the file when it was read, by `file_state`
    by_path: bool = False  # some images are separate files, of which `sha256` covers the size only

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def row(self) -> dict[str, int]:
        """item_id -> row"""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def titles(self) -> list[str]:
        """The title of every item."""
        return [self.text(row, "title") for row in range(len(self))]

    def only(self, item_ids: list[str]) -> "Catalog":
        """Returns the items `item_ids`, in this order, with their texts and without images. Not for a streamed catalogue."""
        rows = np.array([self.row[item] for item in item_ids], np.int64)
        texts = {name: column.take(pa.array(rows)) for name, column in self._texts.items() if isinstance(column, pa.Array)}
        available = self.availability and self.availability.take(rows)
        return replace(self, item_ids=item_ids, _texts=texts, _images=None, _present=np.zeros(len(item_ids), bool), availability=available)

    def attributes(self) -> dict[str, pa.Array]:
        """Returns the columns beside title and description, each as texts or lists of texts. Not for a streamed catalogue."""
        attributes = {}
        for name in self.columns:
            column = self._texts[name]
            if name not in ("title", "description") and isinstance(column, pa.Array):
                if inner(column.type) != column.type:
                    texts = [[text for text in map(plain_text, values or []) if text] for values in column.to_pylist()]
                    attributes[name] = pa.array(texts, pa.list_(pa.string()))
                else:
                    attributes[name] = pa.array([plain_text(value) or None for value in column.to_pylist()], pa.string())
        return attributes

    def text(self, row: int, column: str) -> str:
        """Returns the value of a column as text; empty where there is none."""
        return plain_text(self._texts[column][row].as_py())

    def has_image(self, row: int) -> bool:
        """Returns whether the item names an image, which may turn out not to be decodable."""
        return bool(self._present[row])

    def image_bytes(self, row: int) -> bytes | None:
        """Returns the bytes of the image file; None without an image. Raises `ImageError` for a file that cannot be read."""
        if self._images is None or not self._present[row]:
            return None
        record = self._images[row].as_py()
        data, path = record.get("bytes"), record.get("path") or None
        return data if data or path is None else read_image_file(self.path.parent, path, self._where(row))

    def image_size(self, row: int) -> tuple[int, int]:
        """Returns width and height from the file's header; (0, 0) for one that cannot be read."""
        try:
            with Image.open(io.BytesIO(self.image_bytes(row) or b""), formats=FORMATS) as image:
                return image.size
        except Exception:  # `image` reports it
            return 0, 0

    def image(self, row: int) -> Image.Image | None:
        """Decodes the image; None without one. Raises `ImageError` for one that cannot be decoded."""
        data = self.image_bytes(row)
        return None if data is None else decode_image(data, self._where(row))

    def _where(self, row: int) -> str:
        return f"{self.path} row {row}, item_id {self.item_ids[row]!r}"


def plain_text(value: Any) -> str:
    """Formats a value as a person would write it."""
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
    if isinstance(value, tuple):  # of a mapping of names to values
        return ": ".join(text for text in map(plain_text, value) if text)
    if isinstance(value, list):
        return ", ".join(text for text in map(plain_text, value) if text)
    return str(value)


def load_catalog(data: Path, stream: bool = False) -> Catalog:
    """Loads the items of a data folder. Raises `UserError` (3).

    With `stream` little more than the item_ids is held in memory: for one pass in row order.
    """
    path = data_file(data, ITEMS)
    state = file_state(path)
    file = open_parquet(path, f"give a folder with {ITEMS} and {SESSIONS}, e.g. from `tpad prepare`")
    schema = file.schema_arrow
    need_columns(path, schema, {"item_id": is_text, "title": lambda kind: is_text(kind) or pa.types.is_null(kind)})
    images = "image" in schema.names
    if images:
        need_columns(path, schema, {"image": is_image})
    columns = [f.name for f in schema if f.name not in ("item_id", "image", *AVAILABILITY) and not has_binary(f.type)]
    limits = [name for name in AVAILABILITY if name in schema.names]
    cache_bytes = STREAM_BYTES if stream else CACHE_BYTES
    try:
        sha256 = sha256_file(path)
        table = file.read(columns=["item_id", *limits, *([] if stream else columns)], use_threads=False)
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
    text_columns = [name for name in columns if is_text(inner(schema.field(name).type)) and not _addresses(file, name)]
    available = read_availability(path, table)
    return Catalog(path, sha256, item_ids, columns, text_columns, texts, image_column, present, available, state, bool(linked))
