"""Reads the files of a table into DuckDB: CSV, TSV and JSON lines as text, Parquet through Arrow, which verifies its page checksums.

Nothing is guessed about values here: a cell of CSV or JSON is a text, so that the item_id `007` stays. Columns are `c0`, `c1`, ... inside
the database, because its names do not tell `ID` from `id`.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.parquet_checks import has_binary, is_text, open_parquet, unreadable
from pipeline.data.prepare.database import Database, name, quoted, sql_error
from pipeline.data.prepare.files import Part
from pipeline.data.prepare.layouts import check_width, find_layout, read_error, row_place
from pipeline.data.prepare.mapping import Side
from pipeline.data.prepare.table_options import Report

SAMPLE_ROWS = 10_000
BATCH_ROWS = 131_072
KINDS = {  # binary, decimal and other ones are not read as ids or times
    "text": is_text,
    "null": pa.types.is_null,
    "integer": pa.types.is_integer,
    "boolean": pa.types.is_boolean,
    "float": pa.types.is_floating,
    "time": lambda kind: pa.types.is_timestamp(kind) or pa.types.is_date(kind),
    "binary": has_binary,
    "nested": pa.types.is_nested,
    "decimal": pa.types.is_decimal,
}
UNREAD = ("binary", "other")


class Source:
    """A table of a user, in one file or several."""

    def __init__(self, data: Database, label: str, parts: list[Part], side: Side, given: dict[str, str], report: Report) -> None:
        """`label` is sessions or items; `given`: our column -> the file's, as far as the user or a preset says so."""
        self.data, self.label, self.parts, self.report = data, label, parts, report
        self.path = parts[0].path if len(parts) == 1 else f"{parts[0].path} and {len(parts) - 1} more"
        self.kind = parts[0].kind
        for part in parts:
            find_layout(data, part, side, label, given)
        self.names = list(dict.fromkeys(column for part in parts for column in (*part.names, *part.hive)))
        check_width(self.names, self.path)
        self.lists = set[str]().union(*(part.lists for part in parts))
        self.kinds = {column: self._kind(column) for column in self.names}
        self.listed: str | None = None  # a column of lists of events, ...
        self.exploded: list[str] = []  # ... and the keys of the events, which are columns too
        self.starts: list[int] = []  # of every part, its first row in the loaded table
        self.one_row_each = True  # a row of the table is a row of the file
        self.rows = 0

    def _kind(self, column: str) -> str:
        """Returns one of KINDS, or other; text where the parts differ."""
        types = [part.types[column] for part in self.parts if column in part.types]
        types = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in types]
        kinds = {next((name for name, fits in KINDS.items() if fits(kind)), "other") for kind in types}
        if len(kinds) > 1:
            kinds.discard("null")
        return kinds.pop() if len(kinds) == 1 else "text"

    def arrow_type(self, column: str) -> pa.DataType:
        types = [part.types[column] for part in self.parts if column in part.types]
        return next((kind for kind in types if not pa.types.is_null(kind)), pa.string())

    def explode(self, column: str | None) -> None:
        """Makes the values of the events listed in a column columns of their own, a row an event."""
        if column is None or column not in self.names:
            return
        self.load("listed", {"x": self.ref(column)}, limit=SAMPLE_ROWS)
        keys = "select unnest(json_keys(e)) k, generate_subscripts(json_keys(e), 1) p"
        events = "(select unnest(json_extract(x, '$[*]')) e from listed)"
        try:
            found = self.data.rows(f"select k, min(p) from ({keys} from {events}) group by k order by min(p)")
        except duckdb.Error:
            raise UserError(f"`{column}` is not a list of events in JSON ({self.path}); check the preset", DATA) from None
        self.exploded = [key for key, _ in found]
        self.listed = column if found else None
        self.names = [one for one in self.names if one != column and one not in self.exploded] + self.exploded
        self.kinds |= dict.fromkeys(self.exploded, "text")

    # --- reading

    def ref(self, column: str) -> str:
        """Returns the SQL of a column, or of a value inside a nested one, `images/0/large`; in the sample as text."""
        if column in self.exploded:
            return f"json_extract_string(e, {quoted(_pointer(column))})"
        if column in self.kinds:
            return f"c{list(self.kinds).index(column)}"
        outer, _, rest = column.partition("/")
        return f"json_extract_string(case when json_valid({self.ref(outer)}) then {self.ref(outer)} end, {quoted('/' + rest)})"

    def text(self, column: str) -> str:
        """Returns the SQL of a column as text, null where it has a word for a missing value."""
        return f"cell(cast({self.ref(column)} as varchar))"

    def has(self, column: str) -> bool:
        return column in self.names or (column.partition("/")[0] in self.names and "/" in column)

    def load(self, table: str, columns: dict[str, str], where: str | None = None, limit: int | None = None) -> None:
        """Makes a table of `columns` (name -> SQL over `ref`), its rows in the order of the files. Raises `UserError` (3).

        A list in `unnest(...)` becomes a row a value. `where`: SQL over the files' own names. `limit`: rows to read.
        """
        data = self.data
        data.run(f"drop table if exists {table}")
        self.starts, self.rows = [], 0
        self.one_row_each = not self.exploded and where is None and not any(sql.startswith("unnest(") for sql in columns.values())
        selected = ", ".join(f"{sql} as {column}" for column, sql in columns.items())
        for part in self.parts:
            try:
                relation = self._relation(part, selected, where, limit and limit - self.rows)
                data.run(f"set threads = {1 if self.kind == 'parquet' else data.threads}")  # several would mix up the batches of Arrow
                data.run(f"{f'insert into {table}' if self.starts else f'create table {table} as'} select {selected} from {relation}")
            except (duckdb.Error, pa.ArrowException) as error:
                if (
                    where is None
                    or isinstance(error, pa.ArrowException | duckdb.IOException)
                    or re.search("CSV Error|Malformed", str(error))
                ):
                    raise read_error(error, part) from None
                raise sql_error(error, f"--where {where}", f"write SQL over the columns {self.some()}", USAGE) from None
            finally:
                data.run(f"set threads = {data.threads}")
            self.starts.append(self.rows)
            self.rows = data.count(table)
            if limit is not None and self.rows >= limit:
                break

    def _relation(self, part: Part, selected: str, where: str | None, limit: int | None) -> str:
        """Returns SQL after FROM with the columns `c0`, ... that are selected, and `e` if events are exploded."""
        used = set(re.findall(r"\bc\d+\b", selected)) | ({self.ref(self.listed)} if self.listed is not None else set())
        filtered = [column for column in self.kinds if where is not None and column.lower() in where.lower()]
        wanted = {column: f"c{n}" for n, column in enumerate(self.kinds) if f"c{n}" in used or column in filtered}
        present = [column for column in wanted if column in part.names]
        values = {column: f"cast({quoted(value)} as varchar)" for column, value in part.hive.items()}
        relation = part.relation
        if part.kind == "csv":
            values |= {column: f"c{part.names.index(column)}" for column in present}
        elif part.kind == "json":
            values |= {column: f"v[{number}]" for number, column in enumerate(present, 1)}
            paths = ", ".join(quoted(_pointer(column)) for column in present)
            relation = f"(select json_extract_string(json, [{paths}]) v from {relation})" if present else relation
        else:
            self.data.connection.register("arrow", _reader(part, present))
            values |= {column: self._uniform(column, f"a{number}", part.types[column]) for number, column in enumerate(present)}
            relation = "arrow"
        for column in wanted:
            value = values.get(column, "cast(null as varchar)")
            values[column] = f"bare({value})" if self.kinds[column] in ("text", "nested") else value
        some = ", ".join(f"{values[column]} as {c}" for column, c in wanted.items()) or "1 as nothing"
        sql = f"(select {some} from {relation}{f' limit {limit}' if limit is not None else ''})"
        if self.listed is not None:
            sql = f"(select *, unnest(json_extract({self.ref(self.listed)}, '$[*]')) e from {sql})"
        return sql if where is None else self._filtered(sql, where, filtered)

    def _filtered(self, relation: str, where: str, filtered: list[str]) -> str:
        """Filters by the user's SQL, in which the columns have their own names, and numbers where all of a sample are numbers."""
        if len(duckdb.extract_statements(f"select 1 where ({where}\n)")) != 1:
            raise UserError(f"--where {where} (command line); give one condition, such as \"event = 'view'\"", USAGE)
        named: dict[str, str] = {}
        for column in filtered:
            if column.lower() not in named and column in self.names and self.kinds[column] not in UNREAD:
                sql = self.ref(column) if self.kinds[column] != "text" else f"cell({self.ref(column)})"
                named[column.lower()] = f"{f'cast({sql} as double)' if self._numeric(column) else sql} as {name(column)}"
        columns = ", ".join(["r as every_column", *named.values()])
        return f"(select unnest(every_column) from (select {columns} from {relation} r) where ({where}\n))"

    def _numeric(self, column: str) -> bool:
        """Returns whether all cells of a column of texts are, in the sample, numbers without leading zeros."""
        numbers = (
            rf"bool_and(regexp_full_match(x, '-?(0|[1-9]\d*)(\.\d+)?')) from (select cell({self.ref(column)}) x from {self.label}_sample)"
        )
        return self.kinds[column] == "text" and bool(self.data.one(f"select {numbers}")[0])

    def _uniform(self, column: str, sql: str, kind: pa.DataType) -> str:
        """Returns the SQL of a Parquet column in the type that it has in all parts."""
        wanted = self.kinds[column]
        if wanted in ("text", "nested") and pa.types.is_nested(kind):
            return f"cast(to_json({sql}) as varchar)"
        if wanted == "time":
            return f"epoch_us(cast({sql} as {'timestamptz' if pa.types.is_timestamp(kind) and kind.tz else 'timestamp'}))"
        types = {"text": "varchar", "boolean": "varchar", "integer": "hugeint" if kind == pa.uint64() else "bigint", "float": "double"}
        return f"cast({sql} as {types[wanted]})" if wanted in types else sql

    def sample(self) -> None:
        """Makes the table `sessions_sample` or `items_sample` of the first rows: all columns but binary ones, as text."""
        readable = [column for column in self.names if self.kinds[column] not in UNREAD and column not in self.exploded]
        columns = {self.ref(column): f"cast({self.ref(column)} as varchar)" for column in readable} | ({"e": "e"} if self.exploded else {})
        self.load(f"{self.label}_sample", columns or {"nothing": "1"}, limit=SAMPLE_ROWS)

    def values(self, column: str) -> Iterator[Any]:
        """Yields the values of a Parquet column, row by row: of images, which need not fit into memory together."""
        for part in self.parts:
            file = open_parquet(part.file, "", part.path)
            try:
                if column not in part.names:
                    yield from itertools.repeat(None, file.metadata.num_rows)
                    continue
                for batch in file.iter_batches(64, columns=[column], use_threads=False):
                    yield from (value.as_py() for value in batch.column(0))
            except (pa.ArrowException, OSError) as error:
                raise unreadable(part.path, error) from None

    # --- messages

    def say(self, note: str) -> None:
        """Adds how this table was read to the report."""
        self.report.say(f"{self.path}: {note}")

    def some(self) -> str:
        """Lists the first column names, for messages."""
        return ", ".join(self.names[:20]) or "no columns"

    def where(self, row: int) -> str:
        """Names the place of a row of the loaded table for people: in a text file by its line."""
        number = max(n for n, start in enumerate(self.starts) if start <= row)
        return row_place(self.parts[number], row - self.starts[number]) if self.one_row_each else self.parts[number].path


def _pointer(column: str) -> str:
    return "/" + column.replace("~", "~0").replace("/", "~1")


def _reader(part: Part, columns: list[str]) -> pa.RecordBatchReader:
    """Returns the columns of a Parquet file as `a0`, `a1`, ..., in batches that are valid."""
    file = open_parquet(part.file, "", part.path)
    if not columns:  # the number of rows alone
        return pa.table({"a": pa.nulls(file.metadata.num_rows)}).to_reader()
    kinds = [pa.float32() if pa.types.is_float16(part.types[column]) else part.types[column] for column in columns]  # as DuckDB reads it
    schema = pa.schema([(f"a{number}", kind) for number, kind in enumerate(kinds)])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=True):
            arrays = [batch.column(column).cast(kind) for column, kind in zip(columns, kinds, strict=True)]
            ordered = pa.RecordBatch.from_arrays(arrays, schema=schema)
            ordered.validate(full=True)
            yield ordered

    return pa.RecordBatchReader.from_batches(schema, batches())
