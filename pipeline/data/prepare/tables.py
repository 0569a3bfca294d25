"""Reads the files of a table into DuckDB: CSV, TSV and JSON lines as text, Parquet through Arrow, which verifies its page checksums.

Nothing is guessed about values here: a cell of CSV or JSON is a text, so that the item_id `007` stays. Columns are `c0`, `c1`, ... inside
the database, because its names do not tell `ID` from `id`.
"""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.parquet_checks import has_binary, is_text, open_parquet, unreadable
from pipeline.data.prepare.database import Database, name, quoted, sql_error
from pipeline.data.prepare.files import Part

LINE_BYTES = 16 * 1024 * 1024  # longest line of a text file
MAX_COLUMNS = 10_000
SAMPLE_ROWS = 10_000
BATCH_ROWS = 131_072
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
class _Layout:
    """How one file is read."""

    names: list[str]
    relation: str = ""  # SQL after FROM; of text files
    delimiter: str = ""
    quote: str = ""
    skip: int = 0
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of Parquet
    lists: set[str] = field(default_factory=set)  # columns whose typed header says that they hold lists, parted by blanks


class Source:
    """A table of a user, in one file or several."""

    def __init__(self, data: Database, label: str, parts: list[Part], reading: Reading, known: Callable[[list[str]], bool]) -> None:
        """`label` is sessions or items; `known(names)`: whether a header names what is needed."""
        self.data, self.label, self.parts, self.reading = data, label, parts, reading
        self.path = parts[0].path if len(parts) == 1 else f"{parts[0].path} and {len(parts) - 1} more"
        self.kind = parts[0].kind
        layout = {"csv": self._csv, "json": self._json, "parquet": self._parquet}[self.kind]
        self.layouts = [layout(part, known) for part in parts]
        self.names = list(
            dict.fromkeys(itertools.chain.from_iterable([*one.names, *part.hive] for one, part in zip(self.layouts, parts, strict=True)))
        )
        if len(self.names) > MAX_COLUMNS:
            raise UserError(f"more than {MAX_COLUMNS:,} columns ({self.path}); is it the right file?", DATA)
        self.lists = set().union(*(one.lists for one in self.layouts))
        self.kinds = {column: self._kind(column) for column in self.names}
        self.exploded: list[str] = []
        self.starts: list[int] = []  # of every part, its first row in the loaded table
        self.one_row_each = True  # a row of the table is a row of the file
        self.rows = 0
        self.explode()

    # --- layouts

    def _csv(self, part: Part, known: Callable[[list[str]], bool]) -> _Layout:
        with part.file.open(encoding="utf-8", newline="") as file:
            first = file.readline(LINE_BYTES).rstrip("\r\n")
            skip = 0
            said = re.fullmatch(r"sep=(.{1,2})", first)
            if said:
                first, skip = file.readline(LINE_BYTES).rstrip("\r\n"), 1
        if not first.strip():
            raise UserError(f"no header ({part.path} line {skip + 1}); the first line must name the columns", DATA)
        delimiter = said[1] if said else None
        if self.reading.delimiter is not None and self.reading.delimiter in first:
            delimiter = self.reading.delimiter
            self.reading.effects.add("delimiter")
        if delimiter is None:
            delimiter = "\t" if part.tabs and "\t" in first else max(DELIMITERS, key=lambda one: first.count(one) * len(one))
            delimiter = delimiter if delimiter in first else ","
        cells = _cells(part, delimiter, '"' if self.reading.quotes != "letters" else "", skip)
        if len(cells) > MAX_COLUMNS:
            raise UserError(f"more than {MAX_COLUMNS:,} columns ({part.path}); is it the right file?", DATA)
        header = [cell.strip() for cell in cells]
        typed = [TYPED.fullmatch(cell) for cell in header]
        lists: set[str] = set()
        if all(typed):
            lists = {match[1] for match in typed if match and match[2].endswith("_seq")}
            header = [match[1] for match in typed if match]
        if not known(header):
            given = next((names for names in self.reading.names if len(names) == len(header)), None)
            if given is not None:
                header = given
                self.reading.effects.add("names")
            elif len(set(header)) < len(header) or any(DATA_CELL.fullmatch(cell) for cell in header):
                example = "session_id,timestamp,item_id" if self.label == "sessions" else "item_id,title"
                fault = f"no header: the first line looks like data, {first[:60]!r} ({part.path} line {skip + 1})"
                raise UserError(f"{fault}; name its {len(header)} columns in order with --names, such as --names {example}", DATA)
            else:
                skip += 1
        else:
            skip += 1
        _no_duplicates(header, part.path)
        layout = _Layout(header, delimiter=delimiter, skip=skip, lists=lists)
        self._quoting(part, layout)
        return layout

    def _quoting(self, part: Part, layout: _Layout) -> None:
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
                return int(self.data.one(f"select count(*) from {relation(quote, escape)}")[0])
            except duckdb.Error as error:
                return error

        said = self.reading.quotes if part.quotes else "letters"
        plain = rows("", "") if said != "cells" else duckdb.Error()
        cells = rows('"', '"') if said != "letters" else duckdb.Error()
        if isinstance(plain, int) and (isinstance(cells, duckdb.Error) or (cells != plain and part.tabs)):
            layout.relation = relation("", "")
        elif isinstance(cells, int):
            layout.relation, layout.quote = relation('"', '"'), '"'
            if said != "cells" and cells != plain:
                _refuse_swallowed_rows(self.data, part, layout, both=isinstance(plain, int))
        elif said != "letters" and isinstance(rows('"', "\\"), int):
            layout.relation, layout.quote = relation('"', "\\"), '"'
        else:
            raise _csv_error(cells if said != "letters" else plain, part)  # type: ignore[arg-type]

    def _json(self, part: Part, known: Callable[[list[str]], bool]) -> _Layout:
        with part.file.open("rb") as file:
            start = file.read(1024).lstrip()
        array = start.startswith(b"[") and not re.search(r"\.(jsonl|ndjson)", part.path, re.IGNORECASE)
        reader = "read_json_objects" if array else "read_ndjson_objects"
        form = ", format = 'array'" if array else ""
        relation = f"{reader}({quoted(str(part.file))}, maximum_object_size = {LINE_BYTES}, compression = 'uncompressed'{form})"
        try:
            others = self.data.one(f"select count(*) filter (json_type(json) <> 'OBJECT') from {relation}")[0]
            keys = (
                f"select unnest(json_keys(json)) k, generate_subscripts(json_keys(json), 1) p from {relation} where json_type(json) = "
                f"'OBJECT'"
            )
            names = [
                row[0] for row in self.data.rows(f"select k, min(p) from ({keys}) group by k order by min(p), k limit {MAX_COLUMNS + 1}")
            ]
        except duckdb.Error as error:
            raise _json_error(error, part) from None
        if others:
            raise _json_error(None, part)
        return _Layout(names, relation)

    def _parquet(self, part: Part, known: Callable[[list[str]], bool]) -> _Layout:
        schema = open_parquet(part.file, "", part.path).schema_arrow
        if len(schema) > MAX_COLUMNS:
            raise UserError(f"more than {MAX_COLUMNS:,} columns ({part.path}); is it the right file?", DATA)
        _no_duplicates(schema.names, part.path)
        return _Layout(schema.names, types={one.name: one.type for one in schema})

    def _kind(self, column: str) -> str:
        """Returns text, nested, integer, float, time, boolean, null, or binary, other and decimal, which are not read as ids or times."""
        kinds = (
            {_arrow_kind(one.types[column]) for one in self.layouts if column in one.types} - {"null"}
            if self.kind == "parquet"
            else {"text"}
        )
        return kinds.pop() if len(kinds) == 1 else "null" if not kinds and any(column in one.types for one in self.layouts) else "text"

    def arrow_type(self, column: str) -> pa.DataType:
        return next(
            (one.types[column] for one in self.layouts if column in one.types and not pa.types.is_null(one.types[column])), pa.string()
        )

    def explode(self) -> None:
        """Makes the values of the events listed in the column `reading.explode` columns of their own, a row an event."""
        if (column := self.reading.explode) is None or column not in self.names:
            return
        keys = (
            "select unnest(json_keys(e)) k, generate_subscripts(json_keys(e), 1) p from (select unnest(json_extract(x, '$[*]')) e from {})"
        )
        self.load("exploded", {"x": self.ref(column)}, limit=SAMPLE_ROWS, explode=False)
        try:
            self.exploded = [
                row[0] for row in self.data.rows(f"select k, min(p) from ({keys.format('exploded')}) group by k order by min(p)")
            ]
        except duckdb.Error:
            raise UserError(f"`{column}` is not a list of events in JSON ({self.path}); check the preset", DATA) from None
        self.names = [one for one in self.names if one != column and one not in self.exploded] + self.exploded
        self.kinds |= dict.fromkeys(self.exploded, "text")

    # --- reading

    def ref(self, column: str) -> str:
        """Returns the SQL of a column, or of a value inside a nested one: `images/0/large`."""
        if column in self.exploded:
            return f"json_extract_string(e, {quoted(_pointer(column))})"
        if column in self.kinds:
            return f"c{list(self.kinds).index(column)}"
        outer, _, rest = column.partition("/")
        if outer in self.names and rest:
            return f"json_extract_string(case when json_valid({self.ref(outer)}) then {self.ref(outer)} end, {quoted('/' + rest)})"
        raise KeyError(column)

    def has(self, column: str) -> bool:
        return column in self.names or (column.partition("/")[0] in self.names and "/" in column)

    def load(
        self,
        table: str,
        columns: dict[str, str],
        where: str | None = None,
        limit: int | None = None,
        explode: bool = True,
        unnest: str | None = None,
        finish: str = "*",
    ) -> None:
        """Makes a table of `columns` (name -> SQL over `ref`), its rows in the order of the files. Raises `UserError` (3).

        `where`: SQL over the files' own names. `unnest`: one of the columns, a list, each of whose values becomes a row; its place in
        the list is the column `o`. `finish`: SQL of what is kept of the columns.
        """
        self.data.run(f"drop table if exists {table}")
        self.starts, made = [], 0
        exploding = explode and bool(self.exploded)
        self.one_row_each = not exploding and unnest is None and where is None
        used = {number for sql in columns.values() for number in map(int, re.findall(r"\bc(\d+)\b", sql))}
        for part, layout in zip(self.parts, self.layouts, strict=True):
            try:
                rows = limit and limit - made
                sql = self._relation(part, layout, used, where, exploding, rows)
                selected = ", ".join(f"{expression} as {column}" for column, expression in columns.items())
                if unnest:
                    outer = ", ".join(column for column in columns if column != unnest)
                    sql = (
                        f"(select {outer}, unnest({unnest}) as {unnest}, generate_subscripts({unnest}, 1) as o from (select {selected} "
                        f"from {sql}))"
                    )
                else:
                    sql = f"(select {selected} from {sql})"
                sql = f"select {finish} from {sql}"
                self.data.run(
                    f"set threads = {1 if self.kind == 'parquet' else self.data.threads}"
                )  # several would mix up the batches of Arrow
                self.data.run(f"insert into {table} {sql}" if self.starts else f"create table {table} as {sql}")
            except UserError:
                raise
            except pa.ArrowException as error:
                raise unreadable(part.path, error) from None
            except duckdb.Error as error:
                raise self._load_error(error, part, where) from None
            self.starts.append(made)
            made = self.data.one(f"select count(*) from {table}")[0]
            if limit is not None and made >= limit:
                break
        self.data.run(f"set threads = {self.data.threads}")
        self.rows = made

    def _load_error(self, error: duckdb.Error, part: Part, where: str | None) -> UserError:
        if (
            where is not None
            and not isinstance(error, duckdb.IOException)
            and "CSV Error" not in str(error)
            and "Malformed" not in str(error)
        ):
            return sql_error(error, f"--where {where}", f"write SQL over the columns {self.some()}", USAGE)
        if self.kind == "csv":
            return _csv_error(error, part)
        if self.kind == "json":
            return _json_error(error, part)
        return unreadable(part.path, error)

    def _relation(self, part: Part, layout: _Layout, used: set[int], where: str | None, exploding: bool, limit: int | None) -> str:
        """Returns SQL after FROM with the columns `c0`, ..., and `e` if events are exploded."""
        every = list(self.kinds)
        if where is not None:
            used = used | {number for number, column in enumerate(every) if column.lower() in where.lower()}
        if exploding:
            assert self.reading.explode is not None
            used = used | {every.index(self.reading.explode)}
        wanted = [every[number] for number in sorted(used)]
        present = [column for column in wanted if column in layout.names]
        values = {column: f"cast({quoted(value)} as varchar)" for column, value in part.hive.items()}
        if self.kind == "csv":
            values |= {column: f"c{layout.names.index(column)}" for column in present}
            inner = layout.relation
        elif self.kind == "json":
            values |= {column: f"v[{number}]" for number, column in enumerate(present, 1)}
            paths = ", ".join(quoted(_pointer(column)) for column in present)
            inner = f"(select json_extract_string(json, [{paths}]) v from {layout.relation})" if present else layout.relation
        else:
            self.data.connection.register("arrow", self._reader(part, present))
            values |= {column: self._uniform(column, f"a{number}", layout.types[column]) for number, column in enumerate(present)}
            inner = "arrow"
        some = ", ".join(f"{values.get(column, 'cast(null as varchar)')} as c{every.index(column)}" for column in wanted) or "1 as nothing"
        sql = f"(select {some} from {inner}{f' limit {limit}' if limit is not None else ''})"
        trimmed = [
            f"bare(c{every.index(column)}) as c{every.index(column)}" for column in wanted if self.kinds[column] in ("text", "nested")
        ]
        sql = f"(select * replace ({', '.join(trimmed)}) from {sql})" if trimmed else sql
        if exploding:
            sql = f"(select *, unnest(json_extract({self.ref(str(self.reading.explode))}, '$[*]')) e from {sql})"
        if where is not None:
            sql = self._filtered(sql, where)
        return sql

    def _filtered(self, relation: str, where: str) -> str:
        """Filters by the user's SQL, in which the columns have their own names, and numbers where all of a sample are numbers."""
        if len(duckdb.extract_statements(f"select 1 where ({where}\n)")) != 1:
            raise UserError(f"--where {where} (command line); give one condition, such as \"event = 'view'\"", USAGE)
        seen: set[str] = set()
        named = []
        for column in self.names:
            if column.lower() in seen or column.lower() not in where.lower() or self.kinds[column] in ("binary", "other"):
                continue
            seen.add(column.lower())
            sql = self.ref(column)
            if self.kinds[column] == "text":
                sql = f"cast(cell({sql}) as double)" if self._numeric(column) else f"cell({sql})"
            named.append(f"{sql} as {name(column)}")
        return f"(select unnest(every_column) from (select {', '.join(['r as every_column', *named])} from {relation} r) where ({where}\n))"

    def _numeric(self, column: str) -> bool:
        """Returns whether all cells of the sample are numbers without leading zeros."""
        number = r"'-?(0|[1-9]\d*)(\.\d+)?'"
        sql = (
            f"select count(*) > 0 and bool_and(regexp_full_match(x, {number})) from (select cell({self.sampled(column)}) x from "
            f"{self.label}_sample) where x is not null"
        )
        return bool(self.data.one(sql)[0])

    def _uniform(self, column: str, sql: str, kind: pa.DataType) -> str:
        """Returns the SQL of a Parquet column in the type that it has in all parts."""
        if self.kinds[column] == "text":
            return f"cast({sql} as varchar)" if not pa.types.is_nested(kind) else f"cast(to_json({sql}) as varchar)"
        if self.kinds[column] == "nested":
            return f"cast(to_json({sql}) as varchar)"
        if self.kinds[column] == "time":
            return f"epoch_us(cast({sql} as {'timestamptz' if pa.types.is_timestamp(kind) and kind.tz else 'timestamp'}))"
        if self.kinds[column] == "boolean":
            return f"cast({sql} as varchar)"
        return (
            f"cast({sql} as {'hugeint' if kind == pa.uint64() else 'bigint'})"
            if self.kinds[column] == "integer"
            else f"cast({sql} as double)"
            if self.kinds[column] == "float"
            else sql
        )

    def _reader(self, part: Part, columns: list[str]) -> pa.RecordBatchReader:
        file = open_parquet(part.file, "", part.path)
        names = [f"a{number}" for number in range(len(columns))]
        kinds = [file.schema_arrow.field(column).type for column in columns]
        kinds = [pa.float32() if pa.types.is_float16(kind) else kind for kind in kinds]  # which DuckDB does not read
        schema = pa.schema(list(zip(names, kinds, strict=True)))

        def batches() -> Iterator[pa.RecordBatch]:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=True):
                arrays = [batch.column(column).cast(kind) for column, kind in zip(columns, kinds, strict=True)]
                ordered = pa.RecordBatch.from_arrays(arrays, schema=schema)
                ordered.validate(full=True)
                yield ordered

        if not columns:  # the number of rows alone
            schema = pa.schema([("a", pa.bool_())])
            return pa.RecordBatchReader.from_batches(
                schema, iter([pa.record_batch([pa.nulls(file.metadata.num_rows, pa.bool_())], schema=schema)])
            )
        return pa.RecordBatchReader.from_batches(schema, batches())

    def sample(self) -> None:
        """Makes the table `sessions_sample` or `items_sample` of the first rows: all columns but binary ones, as text."""
        readable = [column for column in self.names if self.kinds[column] not in ("binary", "other")]
        columns = {name(f"s{self.names.index(column)}"): f"cast({self.ref(column)} as varchar)" for column in readable}
        self.load(f"{self.label}_sample", columns or {"nothing": "1"}, limit=SAMPLE_ROWS)

    def sampled(self, column: str) -> str:
        """Returns the SQL of a column of the sample."""
        if column in self.names:
            return name(f"s{self.names.index(column)}")
        outer, _, rest = column.partition("/")
        return f"json_extract_string(case when json_valid({self.sampled(outer)}) then {self.sampled(outer)} end, {quoted('/' + rest)})"

    def values(self, column: str) -> Iterator[Any]:
        """Yields the values of a Parquet column, row by row: of images, which need not fit into memory together."""
        for part, layout in zip(self.parts, self.layouts, strict=True):
            file = open_parquet(part.file, "", part.path)
            try:
                if column not in layout.names:
                    yield from itertools.repeat(None, file.metadata.num_rows)
                    continue
                for batch in file.iter_batches(64, columns=[column], use_threads=False):
                    yield from (value.as_py() for value in batch.column(0))
            except (pa.ArrowException, OSError) as error:
                raise unreadable(part.path, error) from None

    # --- messages

    def some(self) -> str:
        """Lists the first column names, for messages."""
        return ", ".join(self.names[:20]) or "no columns"

    def where(self, row: int) -> str:
        """Names the place of a row of the loaded table for people: in a text file by its line."""
        number = max(n for n, start in enumerate(self.starts) if start <= row)
        part, layout, row = self.parts[number], self.layouts[number], row - self.starts[number]
        if not self.one_row_each:
            return part.path
        if self.kind == "parquet":
            return f"{part.path} row {row}"
        if self.kind == "json":
            numbers = (number for number, line in enumerate(_lines(part), 1) if line.strip())
            return f"{part.path} line {next(itertools.islice(numbers, row, None), row + 1)}"
        return f"{part.path} line {_csv_line(part, layout, row)}"


def _lines(part: Part) -> Iterator[str]:
    with part.file.open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from file


def _cells(part: Part, delimiter: str, quote: str, skip: int) -> list[str]:
    """Returns the cells of the first row."""
    csv.field_size_limit(LINE_BYTES)
    lines = itertools.islice(_lines(part), skip, None)
    if len(delimiter) > 1 or not quote:
        return next(lines).rstrip("\r\n").split(delimiter)
    try:
        return next(csv.reader(lines, delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(f"not readable as CSV: {error} ({part.path} line {skip + 1}); fix the file", DATA) from None


def _csv_line(part: Part, layout: _Layout, row: int) -> int:
    """Returns the line on which a row begins; not row + 2 where lines are empty or cells hold line ends."""
    csv.field_size_limit(LINE_BYTES)
    lines = itertools.islice(_lines(part), layout.skip, None)
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


def _refuse_swallowed_rows(data: Database, part: Part, layout: _Layout, both: bool) -> None:
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
        for line in itertools.islice(_lines(part), layout.skip, None):
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


def _pointer(column: str) -> str:
    return "/" + column.replace("~", "~0").replace("/", "~1")


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_text(kind):
        return "text"
    if pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "null" if pa.types.is_null(kind) else "integer" if pa.types.is_integer(kind) else "boolean"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "time"
    if has_binary(kind):
        return "binary"
    if pa.types.is_nested(kind):
        return "nested"
    return "decimal" if pa.types.is_decimal(kind) else "other"


def _no_duplicates(names: list[str], path: str) -> None:
    for column, count in Counter(names).items():
        if count > 1:
            raise UserError(f"column `{column}` is duplicated ({path}); keep one", DATA)


def _csv_error(error: duckdb.Error, part: Part) -> UserError:
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


def _json_error(error: duckdb.Error | None, part: Part) -> UserError:
    """Returns an error of the JSON reader as one line; the line is found here, because DuckDB reads in parallel."""
    if re.search(r"\.(jsonl|ndjson)", part.path, re.IGNORECASE) or error is None:
        for number, line in enumerate(_lines(part), 1):
            try:
                record = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as fault:
                return UserError(f"not valid JSON: {fault} ({part.path} line {number}); fix the line", DATA)
            if not isinstance(record, dict):
                return UserError(f"not a JSON object ({part.path} line {number}); every line must be one object", DATA)
    return sql_error(error or duckdb.Error("not JSON objects"), part.path, "fix the file: every line must be one JSON object")
