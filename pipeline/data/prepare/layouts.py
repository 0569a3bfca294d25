"""Finds how a file is laid out: its columns and, of text, what parts its cells, and whether quotation marks enclose them."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import open_parquet
from pipeline.data.prepare.database import Database, quoted, sql_error
from pipeline.data.prepare.files import Part

Known = Callable[[list[str]], bool]  # whether a header names what is needed

LINE_BYTES = 16 * 1024 * 1024  # longest line of a text file
MAX_COLUMNS = 10_000
DELIMITERS = ("\t", "::", ",", ";", "|")
TYPED = re.compile(r"(.*):(token|token_seq|float|float_seq)")
DATA_CELL = re.compile(r"-?\d+([.,]\d+)?|\d{4}-\d\d-\d\d.*|\d\d?[/.]\d\d?[/.]\d{4}.*")


@dataclass
class Reading:
    """How files are read, as far as a user or a preset says so."""

    delimiter: str | None = None
    names: list[list[str]] = field(default_factory=list)  # of the columns, for files without a header
    quotes: str | None = None  # "cells" or "letters": quotation marks enclose cells, or have no meaning
    explode: str | None = None  # column with a JSON list of events
    effects: set[str] = field(default_factory=set)  # options that had an effect


@dataclass
class Layout:
    """How one file is read."""

    names: list[str]
    relation: str = ""  # SQL after FROM; of text files
    delimiter: str = ""
    quote: str = ""
    skip: int = 0
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of Parquet
    lists: set[str] = field(default_factory=set)  # columns whose typed header says that they hold lists, parted by blanks


def csv_layout(data: Database, part: Part, reading: Reading, label: str, known: Known) -> Layout:
    """Finds the header, the delimiter and the quotation of a text file. Raises `UserError` (3)."""
    with part.file.open(encoding="utf-8", newline="") as file:
        first = file.readline(LINE_BYTES).rstrip("\r\n")
        skip = 0
        said = re.fullmatch(r"sep=(.{1,2})", first)
        if said:
            first, skip = file.readline(LINE_BYTES).rstrip("\r\n"), 1
    if not first.strip():
        raise UserError(f"no header ({part.path} line {skip + 1}); the first line must name the columns", DATA)
    delimiter = said[1] if said else None
    if reading.delimiter is not None and reading.delimiter in first:
        delimiter = reading.delimiter
        reading.effects.add("delimiter")
    if delimiter is None:
        delimiter = "\t" if part.tabs and "\t" in first else max(DELIMITERS, key=lambda one: first.count(one) * len(one))
        delimiter = delimiter if delimiter in first else ","
    cells = _cells(part, delimiter, '"' if reading.quotes != "letters" else "", skip)
    if len(cells) > MAX_COLUMNS:
        raise UserError(f"more than {MAX_COLUMNS:,} columns ({part.path}); is it the right file?", DATA)
    header = [cell.strip() for cell in cells]
    typed = [TYPED.fullmatch(cell) for cell in header]
    lists: set[str] = set()
    if all(typed):
        lists = {match[1] for match in typed if match and match[2].endswith("_seq")}
        header = [match[1] for match in typed if match]
    if not known(header):
        given = next((names for names in reading.names if len(names) == len(header)), None)
        if given is not None:
            header = given
            reading.effects.add("names")
        elif len(set(header)) < len(header) or any(DATA_CELL.fullmatch(cell) for cell in header):
            example = "session_id,timestamp,item_id" if label == "sessions" else "item_id,title"
            fault = f"no header: the first line looks like data, {first[:60]!r} ({part.path} line {skip + 1})"
            raise UserError(f"{fault}; name its {len(header)} columns in order with --names, such as --names {example}", DATA)
        else:
            skip += 1
    else:
        skip += 1
    _no_duplicates(header, part.path)
    layout = Layout(header, delimiter=delimiter, skip=skip, lists=lists)
    _quoting(data, part, reading, layout)
    return layout


def _quoting(data: Database, part: Part, reading: Reading, layout: Layout) -> None:
    """Decides whether quotation marks enclose cells or are letters, and that every line is a row of as many columns."""
    columns = "{" + ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(layout.names))) + "}"

    def relation(quote: str, escape: str) -> str:
        return (
            f"read_csv({quoted(str(part.file))}, auto_detect = false, header = false, skip = {layout.skip}, compression = 'none', "
            f"delim = {quoted(layout.delimiter)}, quote = {quoted(quote)}, escape = {quoted(escape)}, columns = {columns}, "
            f"strict_mode = true, max_line_size = {LINE_BYTES})"
        )

    def rows(quote: str, escape: str) -> int | duckdb.Error:
        try:
            return int(data.one(f"select count(*) from {relation(quote, escape)}")[0])
        except duckdb.Error as error:
            return error

    if not part.quotes:
        layout.relation = relation("", "")
        return
    said = reading.quotes
    plain = rows("", "") if said != "cells" else duckdb.Error()
    cells = rows('"', '"') if said != "letters" else duckdb.Error()
    if isinstance(plain, int) and (isinstance(cells, duckdb.Error) or (cells != plain and part.tabs)):
        layout.relation = relation("", "")
    elif isinstance(cells, int):
        layout.relation, layout.quote = relation('"', '"'), '"'
        if said != "cells" and cells != plain:
            _refuse_swallowed_rows(data, part, layout, both=isinstance(plain, int))
    elif said != "letters" and isinstance(rows('"', "\\"), int):
        layout.relation, layout.quote = relation('"', "\\"), '"'
    else:
        raise csv_error(cells if said != "letters" else plain, part)  # type: ignore[arg-type]


def json_layout(data: Database, part: Part, reading: Reading, label: str, known: Known) -> Layout:
    """Finds the names of a file of JSON objects. Raises `UserError` (3)."""
    with part.file.open("rb") as file:
        start = file.read(1024).lstrip()
    array = start.startswith(b"[") and not re.search(r"\.(jsonl|ndjson)", part.path, re.IGNORECASE)
    reader = "read_json_objects" if array else "read_ndjson_objects"
    form = ", format = 'array'" if array else ""
    relation = f"{reader}({quoted(str(part.file))}, maximum_object_size = {LINE_BYTES}, compression = 'uncompressed'{form})"
    try:
        others = data.one(f"select count(*) filter (json_type(json) <> 'OBJECT') from {relation}")[0]
        keys = (
            f"select unnest(json_keys(json)) k, generate_subscripts(json_keys(json), 1) p from {relation} where json_type(json) = 'OBJECT'"
        )
        names = [row[0] for row in data.rows(f"select k, min(p) from ({keys}) group by k order by min(p), k limit {MAX_COLUMNS + 1}")]
    except duckdb.Error as error:
        raise json_error(error, part) from None
    if others:
        raise json_error(None, part)
    return Layout(names, relation)


def parquet_layout(data: Database, part: Part, reading: Reading, label: str, known: Known) -> Layout:
    """Finds the names and types of a Parquet file. Raises `UserError` (3)."""
    schema = open_parquet(part.file, "", part.path).schema_arrow
    if len(schema) > MAX_COLUMNS:
        raise UserError(f"more than {MAX_COLUMNS:,} columns ({part.path}); is it the right file?", DATA)
    _no_duplicates(schema.names, part.path)
    return Layout(schema.names, types={one.name: one.type for one in schema})


def text_lines(part: Part) -> Iterator[str]:
    with part.file.open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from file


def _cells(part: Part, delimiter: str, quote: str, skip: int) -> list[str]:
    """Returns the cells of the first row."""
    csv.field_size_limit(LINE_BYTES)
    lines = itertools.islice(text_lines(part), skip, None)
    if len(delimiter) > 1 or not quote:
        return next(lines).rstrip("\r\n").split(delimiter)
    try:
        return next(csv.reader(lines, delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(f"not readable as CSV: {error} ({part.path} line {skip + 1}); fix the file", DATA) from None


def csv_line(part: Part, layout: Layout, row: int) -> int:
    """Returns the line on which a row begins; not row + 2 where lines are empty or cells hold line ends."""
    csv.field_size_limit(LINE_BYTES)
    lines = itertools.islice(text_lines(part), layout.skip, None)
    if not layout.quote:
        numbers = (number for number, line in enumerate(lines, layout.skip + 1) if line.strip("\r\n"))
        return next(itertools.islice(numbers, row, None), row + layout.skip + 1)
    reader = csv.reader(lines, delimiter=layout.delimiter)
    rows, end = -1, 0
    for cells in reader:
        begin, end = end + 1, reader.line_num
        rows += bool(cells)
        if cells and rows == row:
            return begin + layout.skip
    return row + layout.skip + 1


def _refuse_swallowed_rows(data: Database, part: Part, layout: Layout, both: bool) -> None:
    """Refuses a row of several lines each of which would be a row: a quotation mark that is never closed swallows them.

    `both`: whether every line of the file would be a row.
    """
    width = len(layout.names)
    breaks = " or ".join(f"contains(c{i}, chr(10))" for i in range(width))
    if width < 2 or not data.first(f"select 1 from {layout.relation} where {breaks} limit 1"):
        return
    csv.field_size_limit(LINE_BYTES)
    lines: list[str] = []

    def recorded() -> Iterator[str]:
        for line in itertools.islice(text_lines(part), layout.skip, None):
            lines.append(line)
            yield line

    reader = csv.reader(recorded(), delimiter=layout.delimiter)
    for _ in reader:
        if len(lines) > (1 if both else 2 if width == 2 else 1) and all(line.count(layout.delimiter) == width - 1 for line in lines):
            place = f"{part.path} line {layout.skip + reader.line_num - len(lines) + 1}"
            fault = f"a quotation mark opens a cell of {len(lines)} lines, each of which looks like a row ({place})"
            raise UserError(
                f"{fault}; close it or, if it is right, give --quotes cells, or --quotes letters where they have no meaning", DATA
            )
        lines.clear()


def _no_duplicates(names: list[str], path: str) -> None:
    for column, count in Counter(names).items():
        if count > 1:
            raise UserError(f"column `{column}` is duplicated ({path}); keep one", DATA)


def csv_error(error: duckdb.Error, part: Part) -> UserError:
    """Returns an error of the CSV reader as one line, without its advice, which is about options of DuckDB."""
    text = str(error)
    line = re.search(r"CSV Error on Line: (\d+)", text)
    place = f"{part.path} line {line[1]}" if line else part.path
    found = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    if found:
        return UserError(f"Expected {found[1]} columns, but there are {found[2]} ({place}); fix the line, or give its --delimiter", DATA)
    if "unterminated quote" in text:
        return UserError(f"a quotation mark is not closed, or is followed by text ({place}); double it, or close it before the comma", DATA)
    if "unicode" in text:
        return UserError(f"not text in UTF-8 ({place}); give its encoding, such as --encoding cp1252", DATA)
    if "line size" in text.lower():
        return UserError(f"a line is longer than {LINE_BYTES // 2**20} MB ({place}); is a quotation mark not closed?", DATA)
    return sql_error(error, place, "fix the file")


def json_error(error: duckdb.Error | None, part: Part) -> UserError:
    """Returns an error of the JSON reader as one line; the line is found here, because DuckDB reads in parallel."""
    if re.search(r"\.(jsonl|ndjson)", part.path, re.IGNORECASE) or error is None:
        for number, line in enumerate(text_lines(part), 1):
            try:
                record = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as fault:
                return UserError(f"not valid JSON: {fault} ({part.path} line {number}); fix the line", DATA)
            if not isinstance(record, dict):
                return UserError(f"not a JSON object ({part.path} line {number}); every line must be one object", DATA)
    return sql_error(error or duckdb.Error("not JSON objects"), part.path, "fix the file: every line must be one JSON object")
