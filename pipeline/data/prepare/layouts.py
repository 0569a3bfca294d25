"""Finds how a file is laid out: its columns and, of text, what parts its cells, and whether quotation marks enclose them."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import open_parquet, unreadable
from pipeline.data.prepare.column_names import is_header
from pipeline.data.prepare.database import Database, quoted, sql_error
from pipeline.data.prepare.files import Part
from pipeline.data.prepare.mapping import Side

LINE_BYTES = 16 * 1024 * 1024  # longest line of a text file
MAX_COLUMNS = 10_000
DELIMITERS = ("\t", "::", ",", ";", "|")
TYPED = re.compile(r"(.*):(token|token_seq|float|float_seq)")
DATA_CELL = re.compile(r"-?\d+([.,]\d+)?|\d{4}-\d\d-\d\d.*|\d\d?[/.]\d\d?[/.]\d{4}.*")
EXAMPLES = {"sessions": "session_id,timestamp,item_id", "items": "item_id,title"}
csv.field_size_limit(LINE_BYTES)


def find_layout(data: Database, part: Part, side: Side, label: str, given: dict[str, str]) -> None:
    """Finds the columns of a file of sessions or items, and how to read them. `given`: our column -> its. Raises `UserError` (3)."""
    if part.kind == "csv":
        _find_header(part, side, label, given)
    elif part.kind == "json":
        _find_keys(data, part)
    else:
        part.names = (schema := open_parquet(part.file, "", part.path).schema_arrow).names
        part.types = dict(zip(part.names, schema.types, strict=True))
    check_width(part.names, part.path)
    for column, count in Counter(part.names).items():
        if count > 1:
            raise UserError(f"column `{column}` is duplicated ({part.path}); keep one", DATA)
    if part.kind == "csv":
        _find_quotation(data, part, side.quotes)


def check_width(names: list[str], path: str) -> None:
    """Raises `UserError` (3) for more columns than a table has."""
    if len(names) > MAX_COLUMNS:
        raise UserError(f"more than {MAX_COLUMNS:,} columns ({path}); is it the right file?", DATA)


def _find_header(part: Part, side: Side, label: str, given: dict[str, str]) -> None:
    first = next(_lines(part), "").rstrip("\r\n")
    said = re.fullmatch(r"sep=(.{1,2})", first)
    if said:
        part.skip = 1
        first = next(_lines(part), "").rstrip("\r\n")
    if not first.strip():
        raise UserError(f"no header ({part.path} line {part.skip + 1}); the first line must name the columns", DATA)
    if side.delimiter is not None and side.delimiter in first:
        part.delimiter = side.delimiter
        part.effects.add("delimiter")
    elif said or (part.tabs and "\t" in first):
        part.delimiter = said[1] if said else "\t"
    else:
        best = max(DELIMITERS, key=lambda one: first.count(one) * len(one))
        part.delimiter = best if best in first else ","
    header = [cell.strip() for cell in _cells(part, first, side.quotes)]
    typed = [match for cell in header if (match := TYPED.fullmatch(cell))]
    if len(typed) == len(header):
        header = [match[1] for match in typed]
        part.lists = {match[1] for match in typed if match[2].endswith("_seq")}
    known = is_header(header, label, given)
    part.names = header if known else next((names for names in side.names if len(names) == len(header)), header)
    if part.names is not header:
        part.effects.add("names")
    elif not known and (len(set(header)) < len(header) or any(DATA_CELL.fullmatch(cell) for cell in header)):
        fault = f"no header: the first line looks like data, {first[:60]!r} ({part.path} line {part.skip + 1})"
        raise UserError(f"{fault}; name its {len(header)} columns in order with --names, such as --names {EXAMPLES[label]}", DATA)
    else:
        part.skip += 1


def _cells(part: Part, first: str, quotes: str | None) -> list[str]:
    """Returns the cells of the first row, whose first line is `first`."""
    if len(part.delimiter) > 1 or quotes == "letters":
        return first.split(part.delimiter)
    try:
        return next(csv.reader(_lines(part), delimiter=part.delimiter), [])
    except csv.Error as error:
        raise UserError(f"not readable as CSV: {error} ({part.path} line {part.skip + 1}); fix the file", DATA) from None


def _find_quotation(data: Database, part: Part, said: str | None) -> None:
    """Decides whether quotation marks enclose cells or are letters, and that every line is a row of as many columns."""
    columns = "{" + ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(part.names))) + "}"

    def relation(quote: str, escape: str) -> str:
        return (
            f"read_csv({quoted(str(part.file))}, auto_detect = false, header = false, skip = {part.skip}, compression = 'none', "
            f"delim = {quoted(part.delimiter)}, quote = {quoted(quote)}, escape = {quoted(escape)}, columns = {columns}, "
            f"strict_mode = true, max_line_size = {LINE_BYTES})"
        )

    def rows(quote: str, escape: str) -> int | duckdb.Error:
        try:
            return data.count(relation(quote, escape))
        except duckdb.Error as error:
            return error

    part.relation = relation("", "")
    if not part.quotes:
        return
    plain = rows("", "") if said != "cells" else duckdb.Error()
    cells = rows('"', '"') if said != "letters" else duckdb.Error()
    if isinstance(plain, int) and (isinstance(cells, duckdb.Error) or (cells != plain and part.tabs)):
        return
    part.quote = '"'
    if isinstance(cells, int):
        part.relation = relation('"', '"')
        if said != "cells" and cells != plain:
            _refuse_swallowed_rows(data, part, every_line=isinstance(plain, int))
    elif said != "letters" and isinstance(rows('"', "\\"), int):
        part.relation = relation('"', "\\")
    else:
        raise read_error(cells if said != "letters" else plain, part)  # type: ignore[arg-type]


def _refuse_swallowed_rows(data: Database, part: Part, every_line: bool) -> None:
    """Refuses a row of several lines each of which would be a row: a quotation mark that is never closed swallows them.

    `every_line`: whether every line of the file would be a row.
    """
    width = len(part.names)
    breaks = " or ".join(f"contains(c{i}, chr(10))" for i in range(width))
    if width < 2 or not data.first(f"select 1 from {part.relation} where {breaks} limit 1"):
        return
    for begin, lines, _ in _quoted_rows(part):
        least = 2 if every_line or width > 2 else 3
        if len(lines) >= least and all(line.count(part.delimiter) == width - 1 for line in lines):
            fault = f"a quotation mark opens a cell of {len(lines)} lines, each of which looks like a row ({part.path} line {begin})"
            remedy = "close it or, if it is right, give --quotes cells, or --quotes letters where they have no meaning"
            raise UserError(f"{fault}; {remedy}", DATA)


def _quoted_rows(part: Part) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yields the number of the first line, the lines and the cells of each row of a file with quotation marks."""
    lines: list[str] = []

    def recorded() -> Iterator[str]:
        for line in _lines(part):
            lines.append(line)
            yield line

    reader = csv.reader(recorded(), delimiter=part.delimiter)
    for cells in reader:
        yield part.skip + reader.line_num - len(lines) + 1, lines, cells
        lines.clear()


def _find_keys(data: Database, part: Part) -> None:
    """Finds the keys of a file of JSON objects, a line each or in one list."""
    with part.file.open("rb") as file:
        array = file.read(1024).lstrip().startswith(b"[") and not _has_lines(part)
    reader, form = ("read_json_objects", ", format = 'array'") if array else ("read_ndjson_objects", "")
    part.relation = f"{reader}({quoted(str(part.file))}, maximum_object_size = {LINE_BYTES}, compression = 'uncompressed'{form})"
    keys = "select unnest(json_keys(json)) k, generate_subscripts(json_keys(json), 1) p"
    try:
        others = data.count(f"{part.relation} where json_type(json) <> 'OBJECT'")
        found = f"({keys} from {part.relation} where json_type(json) = 'OBJECT')"
        part.names = [key for key, _ in data.rows(f"select k, min(p) from {found} group by k order by min(p), k limit {MAX_COLUMNS + 1}")]
    except duckdb.Error as error:
        raise read_error(error, part) from None
    if others:
        raise read_error(duckdb.Error("not JSON objects"), part)


def _has_lines(part: Part) -> bool:
    return bool(re.search(r"\.(jsonl|ndjson)", part.path, re.IGNORECASE))


def _lines(part: Part) -> Iterator[str]:
    """Yields the lines of a text file from the first row on, each cut at the most that is read."""
    with part.file.open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from itertools.islice(iter(lambda: file.readline(LINE_BYTES), ""), part.skip, None)


def row_place(part: Part, row: int) -> str:
    """Names the place of a row for people: in a text file by the line on which it begins; lines may be empty, and cells have several."""
    if part.kind == "parquet" or part.relation.startswith("read_json_objects"):
        return f"{part.path} row {row}"
    if part.quote:
        begins: Iterator[int] = (begin for begin, _, cells in _quoted_rows(part) if cells)
    else:
        blank = "\r\n" if part.kind == "csv" else None
        begins = (number for number, line in enumerate(_lines(part), part.skip + 1) if line.strip(blank))
    return f"{part.path} line {next(itertools.islice(begins, row, None), part.skip + row + 1)}"


def read_error(error: duckdb.Error | pa.ArrowException, part: Part) -> UserError:
    """Returns an error of reading a file as one line, without DuckDB's advice, which is about its own options."""
    if part.kind == "parquet":
        return unreadable(part.path, error)
    text = str(error).replace(str(part.file), part.path)  # not its copy
    if part.kind == "csv":
        line = re.search(r"CSV Error on Line: (\d+)", text)
        place = f"{part.path} line {line[1]}" if line else part.path
        if found := re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text):
            fault = f"Expected {found[1]} columns, but there are {found[2]} ({place}); fix the line, or give its --delimiter"
        elif "unterminated quote" in text:
            fault = f"a quotation mark is not closed, or is followed by text ({place}); double it, or close it before the comma"
        elif "unicode" in text:
            fault = f"not text in UTF-8 ({place}); give its encoding, such as --encoding cp1252"
        elif "line size" in text.lower():
            fault = f"a line is longer than {LINE_BYTES // 2**20} MB ({place}); is a quotation mark not closed?"
        else:
            return sql_error(text, place, "fix the file")
        return UserError(fault, DATA)
    if _has_lines(part) or text == "not JSON objects":
        for number, row in enumerate(_lines(part), 1):  # DuckDB reads in parallel, and does not know the line
            try:
                record = json.loads(row) if row.strip() else {}
            except (ValueError, RecursionError) as reason:
                return UserError(f"not valid JSON: {reason} ({part.path} line {number}); fix the line", DATA)
            if not isinstance(record, dict):
                return UserError(f"not a JSON object ({part.path} line {number}); every line must be one object", DATA)
    return sql_error(text, part.path, "fix the file: every line must be one JSON object")
