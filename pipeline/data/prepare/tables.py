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
from pipeline.data.prepare.layouts import (
    MAX_COLUMNS,
    Known,
    Layout,
    Reading,
    csv_error,
    csv_layout,
    csv_line,
    json_error,
    json_layout,
    parquet_layout,
    text_lines,
)

SAMPLE_ROWS = 10_000
BATCH_ROWS = 131_072


class Source:
    """A table of a user, in one file or several."""

    def __init__(self, data: Database, label: str, parts: list[Part], reading: Reading, known: Known) -> None:
        """`label` is sessions or items; `known(names)`: whether a header names what is needed."""
        self.data, self.label, self.parts, self.reading = data, label, parts, reading
        self.path = parts[0].path if len(parts) == 1 else f"{parts[0].path} and {len(parts) - 1} more"
        self.kind = parts[0].kind
        layout = {"csv": csv_layout, "json": json_layout, "parquet": parquet_layout}[self.kind]
        self.layouts = [layout(data, part, reading, label, known) for part in parts]
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
            return csv_error(error, part)
        if self.kind == "json":
            return json_error(error, part)
        return unreadable(part.path, error)

    def _relation(self, part: Part, layout: Layout, used: set[int], where: str | None, exploding: bool, limit: int | None) -> str:
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
            numbers = (number for number, line in enumerate(text_lines(part), 1) if line.strip())
            return f"{part.path} line {next(itertools.islice(numbers, row, None), row + 1)}"
        return f"{part.path} line {csv_line(part, layout, row)}"


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
