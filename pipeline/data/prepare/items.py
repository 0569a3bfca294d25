"""Reads a catalogue: unique ids, texts, times of availability, and every other column as a typed attribute.

The type of an attribute is decided by its values written as text, by the same rules for every format, so that the same catalogue gives the
same file from CSV, JSON lines and Parquet: whole numbers, numbers, true or false, lists, mappings of names to values, or else texts.
"""

from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.availability import COLUMNS as AVAILABILITY
from pipeline.data.availability import read_availability
from pipeline.data.prepare.column_names import ITEM_NAMES
from pipeline.data.prepare.columns import Columns
from pipeline.data.prepare.database import Database, name
from pipeline.data.prepare.ids import check_ids_sql, id_sql
from pipeline.data.prepare.tables import UNREAD, Source
from pipeline.data.prepare.timestamps import Clock, find_clock, settle_unit

INTEGER = r"'-?(0|[1-9]\d{0,17})(\.0+)?'"
NUMBER = r"'-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?'"
NESTED = 200  # deepest nesting of JSON in a cell


def load_items(columns: Columns, limit: int | None) -> dict[str, str]:
    """Makes the table `items`, and returns SQL of every column to write but the image. Raises `UserError` (3)."""
    source = columns.source
    select = {"item_id": f"cast({id_sql(columns, 'item_id')} as varchar)", "title": _text(source.text(columns.need("title")))}
    if (column := columns.get("description")) is not None:
        select["description"] = _text(source.text(column))
    result = {role: role for role in select}
    clocks = {role: find_clock(source, column, None) for role in AVAILABILITY if (column := columns.get(role)) is not None}
    for role, clock in clocks.items():
        select |= {role: clock.sql, f"{role}_bad": f"case when {clock.sql} is null then {source.text(columns.need(role))} end"}
    for role in ("image", "image_url"):
        if (column := columns.get(role)) is not None and source.kinds.get(column, "text") in ("text", "nested", "null"):
            x = source.text(column)
            select[role] = f"case when {x} like '[%' then cell_list({x})[1] else {x} end"  # of several images, the first
    attributes = _attribute_columns(columns)
    select |= {f"a{number}": f"cell({_written(source, column)})" for number, column in enumerate(attributes)}
    source.load("items", select, limit=limit)
    if not source.rows:
        raise UserError(f"no items ({source.path}); a catalogue needs at least one row", DATA)
    columns.describe()
    _check_ids(columns)
    for role, clock in clocks.items():
        result[role] = _availability(columns, role, clock)
    if clocks:
        limits = ", ".join(f"{result[role]} as {role}" for role in clocks)
        read_availability(Path(source.path), source.data.connection.sql(f"select {limits} from items order by rowid").to_arrow_table())
    return result | _attributes(source, attributes)


def _text(x: str) -> str:
    """Returns SQL of a text; the parts of a list are joined by blanks."""
    joined = f"coalesce(array_to_string(cell_list({x}), ' '), {x})"
    return f"case when {x} = '[]' then null when regexp_matches({x}, '^\\[\\s*[''\"]') then {joined} else {x} end"


def _attribute_columns(columns: Columns) -> list[str]:
    """Returns the columns of the file that become attributes."""
    source, attributes = columns.source, []
    read = {*columns.columns.values(), *(column.partition("/")[0] for column in columns.columns.values())}
    for column in source.names:
        if column in read:
            continue
        if not column or column in ITEM_NAMES or source.kinds[column] in (*UNREAD, "null"):
            source.say(f"column `{column}` left out")
        else:
            attributes.append(column)
    return attributes


def _written(source: Source, column: str) -> str:
    """Returns SQL of a value as it would be written in CSV."""
    sql = source.ref(column)
    if source.kinds.get(column) == "time":
        sql = f"make_timestamp({sql})"
        sql = f"cast({sql} as date)" if pa.types.is_date(source.arrow_type(column)) else sql
    return f"cast({sql} as varchar)"


def _check_ids(columns: Columns) -> None:
    source, data = columns.source, columns.source.data
    row = data.one("select min(rowid) from items where item_id is null")[0]
    if row is not None:
        raise UserError(f"item_id is empty ({source.where(row)}); every row needs a short, printable item_id", DATA)
    check_ids_sql(columns, "items", "item_id", "item_id")
    rows = "select item_id, list(rowid order by rowid) r from items group by item_id having count(*) > 1"
    if double := data.first(f"{rows} order by list_extract(r, 2) limit 1"):
        item_id, (first, second, *_) = double
        raise UserError(f"item_id {item_id!r} is duplicated ({source.where(second)} and {source.where(first)}); keep one of them", DATA)


def _availability(columns: Columns, role: str, clock: Clock) -> str:
    source = columns.source
    row, text = source.data.one(f"select min(rowid), arg_min({role}_bad, rowid) from items where {role}_bad is not null")
    if row is not None:
        raise UserError(f"`{columns.need(role)}` {text[:40]!r} is not a time ({source.where(row)}); give seconds or ISO 8601", DATA)
    sql, unit, _ = settle_unit(source, "items", role, clock, columns.need(role))
    return f"cast(make_timestamp(cast(floor({sql} / {unit}) as bigint) * 1000000) as timestamp_s)"


def _attributes(source: Source, attributes: list[str]) -> dict[str, str]:
    """Returns SQL of the attributes, each in the type that fits all its values."""
    fits = (
        *(f"regexp_full_match(x, {pattern})" for pattern in (INTEGER, NUMBER)),
        *("lower(x) in ('true', 'false')", "x like '[%'", "x like '{%'", "contains(x, '|')", "contains(x, ' | ')"),
    )
    source.data.run(f"create or replace macro counts(x) as [count(x), {', '.join(f'count(*) filter ({test})' for test in fits)}]")
    counted = ", ".join(f"counts(a{number})" for number in range(len(attributes)))
    found = source.data.one(f"select {counted} from items") if attributes else ()
    result = {}
    for number, (column, counts) in enumerate(zip(attributes, found, strict=True)):
        x, (count, integers, numbers, booleans, lists, mappings, parted, loose) = f"a{number}", counts
        result[column] = x
        if not count:
            result[column] = f"cast({x} as varchar)"
        elif integers == count:
            result[column] = f"cast(split_part({x}, '.', 1) as bigint)"
        elif numbers == count:
            result[column] = f"cast({x} as double)"
        elif booleans == count:
            result[column] = f"cast({x} as boolean)"
        elif column in source.lists:
            result[column] = f"string_split_regex({x}, '\\s+')"
        elif lists == count and _casts(source, x, column, f"cell_list({x})"):
            result[column] = f"parts_of(cell_list({x}))"
        elif mappings == count and _casts(source, x, column, f"try_cast(try_cast({x} as json) as map(varchar, varchar))"):
            result[column] = f"cast(cast({x} as json) as map(varchar, varchar))"
        elif parted and not loose and _repeats(source.data, x):
            result[column] = f"parts_of(string_split({x}, '|'))"
    return result


def _casts(source: Source, x: str, column: str, sql: str) -> bool:
    """Returns whether all values are of a type. Raises `UserError` (3) for one that is nested without end."""
    opened = f"strlen({x}) - strlen(replace(replace({x}, '[', ''), '{{', '')) > {NESTED}"
    nested = f"regexp_matches({x}, '([\\[{{][^\\]}}]*){{{NESTED}}}')"
    deep = source.data.one(f"select min(rowid) from items where {opened} and {nested}")[0]
    if deep is not None:
        raise UserError(f"`{column}` is nested more than {NESTED} deep ({source.where(deep)}); give a flat value", DATA)
    try:
        return not source.data.first(f"select 1 from items where {x} is not null and {sql} is null limit 1")
    except duckdb.Error:
        return False


def _repeats(data: Database, x: str) -> bool:
    """Returns whether the parts between bars occur again and again, as those of a list of genres, and not of a title."""
    parts = f"(select unnest(string_split({x}, '|')) t from items where {x} is not null)"
    return bool(data.one(f"select count(distinct t) * 2 <= count(t) from {parts}")[0])


def select_sql(columns: dict[str, str]) -> str:
    """Returns SQL of the rows to write, in the order of the files; `columns`: name -> SQL."""
    return f"select {', '.join(f'{sql} as {name(column)}' for column, sql in columns.items())} from items order by rowid"


def plain(table: pa.Table) -> pa.Table:
    """Returns a table with the types of `items.parquet`: strings instead of views."""
    kinds = [pa.string() if pa.types.is_string_view(kind) or pa.types.is_large_string(kind) else kind for kind in table.schema.types]
    return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))
