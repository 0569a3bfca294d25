"""Reads foreign files (CSV, TSV, JSON lines, Parquet; text also as .gz) as Arrow columns, without changing values.

Cells of CSV stay strings: guessing types would turn the item_id `007` into 7. Text files are held in memory, Parquet is read by
column, and its images row by row.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, UserError
from pipeline.data.catalog import plain_text
from pipeline.data.parquet_checks import is_text, open_parquet, unreadable

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
LARGEST_WHOLE = 2**53  # above this, floats cannot hold every whole number
BLOCK_BYTES = 16 * 1024 * 1024  # block of CSV; also the longest row


@dataclass
class SourceTable:
    """A foreign file as a table."""

    path: Path
    kind: str  # a value of FORMATS
    schema: pa.Schema
    rows: int
    _table: pa.Table | None = None
    _file: pq.ParquetFile | None = None
    _lines: list[int] = field(default_factory=list)  # line of each row, for JSON lines

    def column(self, name: str) -> pa.ChunkedArray:
        """Reads a column. Raises `UserError` (3)."""
        if self._table is not None:
            return self._table[name]
        assert self._file is not None
        try:
            column = self._file.read(columns=[name], use_threads=False).column(0)
            column.validate(full=True)
            return column
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from None

    def values(self, name: str) -> Iterator[Any]:
        """Yields the values of a column; those of a Parquet file are not all held in memory."""
        if self._table is not None:
            yield from (value.as_py() for value in self._table[name])
            return
        assert self._file is not None
        try:
            for batch in self._file.iter_batches(64, columns=[name], use_threads=False):
                yield from (value.as_py() for value in batch.column(0))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from None

    def ids(self, name: str) -> pa.ChunkedArray:
        """Reads ids as strings without surrounding white space, or null. 12.0 becomes 12, since integers with gaps are stored as floats.

        Raises `UserError` (3).
        """
        values = self.column(name)
        kind = values.type
        if pa.types.is_floating(kind):
            is_whole = pc.fill_null(pc.or_(pc.equal(pc.floor(values), values), pc.is_nan(values)), True)
            row = pc.index(is_whole, False).as_py()
            if row >= 0:
                raise UserError(f"`{name}` {values[row]} is not an id ({self.where(row)}); ids are strings or whole numbers", DATA)
            too_large = pc.index(pc.fill_null(pc.greater(pc.abs(values), LARGEST_WHOLE), False), True).as_py()
            if too_large >= 0:
                message = f"`{name}` {values[too_large]} is too large for a number with a point, and has lost digits"
                raise UserError(f"{message} ({self.where(too_large)}); give the ids as strings", DATA)
            values = pc.if_else(pc.is_nan(values), None, values).cast(pa.int64())
        elif not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise UserError(f"column `{name}` has the wrong type, {kind} ({self.path}); ids are strings or whole numbers", DATA)
        trimmed = pc.utf8_trim_whitespace(values.cast(pa.string()))
        ids = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
        return ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([ids])

    def need(self, columns: dict[str, str], name: str) -> str:
        """Returns the file's name of our column `name`. Raises `UserError` (3) if the file lacks it."""
        if name not in columns:
            raise UserError(f"column `{name}` is missing ({self.path} has {self.some()}); name it with --column {name}=NAME", DATA)
        return columns[name]

    def some(self) -> str:
        """Lists the first column names, for messages."""
        return ", ".join(self.schema.names[:20]) or "no columns"

    def where(self, row: int) -> str:
        """Names the place of a row for people: in a text file by line."""
        if self.kind == "parquet":
            return f"{self.path} row {row}"
        if self.kind == "jsonl":
            return f"{self.path} line {self._lines[row]}"
        return f"{self.path} line {_csv_line(self.path, row)}"


def open_table(path: Path) -> SourceTable:
    """Opens a file by its suffix. Raises `UserError` (3)."""
    plain_name = path.name.removesuffix(".gz").lower()
    kind = FORMATS.get(Path(plain_name).suffix, "")
    if not path.is_file():
        raise UserError(f"file not found ({path}); give an existing CSV, TSV, JSON lines or Parquet file", DATA)
    if not kind or (kind == "parquet" and path.name.endswith(".gz")):
        raise UserError(f"unknown kind of file ({path}); give .csv, .tsv or .jsonl (also .gz), or .parquet", DATA)
    if kind == "parquet":
        file = open_parquet(path, "")
        source = SourceTable(path, kind, file.schema_arrow, file.metadata.num_rows, _file=file)
    else:
        table, lines = (_read_csv(path), []) if kind == "csv" else _read_jsonl(path)
        source = SourceTable(path, kind, table.schema, len(table), _table=table, _lines=lines)
    for name in source.schema.names:
        if source.schema.names.count(name) > 1:
            raise UserError(f"column `{name}` is duplicated ({path}); keep one", DATA)
    return source


def _stream(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_stream(path), encoding="utf-8-sig", newline="")


def _delimiter(path: Path) -> str:
    if path.name.removesuffix(".gz").lower().endswith(".tsv"):
        return "\t"
    with _text(path) as file:
        header = file.readline(1_000_000)
    return max(",;\t|", key=header.count)  # the comma, if none of them occurs


def _read_csv(path: Path) -> pa.Table:
    try:
        delimiter = _delimiter(path)
        with _text(path) as file:
            header = next(csv.reader(file, delimiter=delimiter), [])
        if not header:
            raise UserError(f"no header ({path} line 1); the first line must name the columns", DATA)
        parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        # `column_names` replaces the header, so that equal names remain distinct until they are refused
        names = [str(i) for i in range(len(header))]
        read = pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows_after_names=1)
        strings = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        with _stream(path) as file:
            table = pacsv.read_csv(file, read, parse, strings)
        return table.rename_columns(header)
    except (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"not readable as CSV in UTF-8: {str(error).rstrip('.')[:200]} ({path}); fix the file", DATA) from None


def _csv_line(path: Path, row: int) -> int:
    """Returns the line on which a row begins; not row + 2 if cells before it hold line breaks."""
    csv.field_size_limit(BLOCK_BYTES)
    with _text(path) as file:
        reader = csv.reader(file, delimiter=_delimiter(path))
        rows, end = -1, 0
        for cells in reader:
            begin, end = end + 1, reader.line_num
            rows += bool(cells)
            if cells and rows == row + 1:
                return begin
    return row + 2


def _read_jsonl(path: Path) -> tuple[pa.Table, list[int]]:
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    try:
        with _text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = _json_record(line, f"{path} line {number}")
                for name in record:
                    columns.setdefault(name, [None] * len(lines))
                for name, values in columns.items():
                    values.append(record.get(name))
                lines.append(number)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"not readable as JSON lines in UTF-8: {error} ({path}); fix the file", DATA) from None
    return pa.table({name: _array(values) for name, values in columns.items()}), lines


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error} ({where}); fix the line", DATA) from None
    if not isinstance(record, dict):
        raise UserError(f"not a JSON object ({where}); every line must be one object", DATA)
    return record


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # values of several types: as text
        texts = (None if value is None else plain_text(value) for value in values)
        return pa.array([None if text is None else text.encode("utf-8", "replace").decode() for text in texts], pa.string())
