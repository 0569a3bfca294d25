"""Reads a catalogue: unique ids, texts, times of availability, and every other column as a typed attribute.

The type of an attribute is decided by its values written as text, by the same rules for every format, so that the same catalogue gives the
same file from CSV, JSON lines and Parquet: whole numbers, numbers, true or false, lists, mappings of names to values, or else texts.
"""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, UserError
from pipeline.data.availability import COLUMNS as AVAILABILITY
from pipeline.data.availability import read_availability
from pipeline.data.prepare.columns import ITEM_NAMES, Columns
from pipeline.data.prepare.database import Database, name
from pipeline.data.prepare.events import check_ids_sql, id_sql
from pipeline.data.prepare.timestamps import find_clock, settle_unit

INTEGER = r"'-?(0|[1-9]\d{0,17})(\.0+)?'"
NUMBER = r"'-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?'"
NESTED = 200  # deepest nesting of JSON in a cell


def load_items(data: Database, columns: Columns, limit: int | None, say: Callable[[str], None]) -> dict[str, str]:
    """Makes the table `items`, and returns SQL of every column to write but the image. Raises `UserError` (3)."""
    source = columns.source
    select = {"item_id": id_sql(columns, "item_id"), "title": _text(source.ref(columns.need("title")))}
    if (column := columns.get("description")) is not None:
        select["description"] = _text(source.ref(column))
    times = {role: find_clock(data, source, column, None) for role in AVAILABILITY if (column := columns.get(role))}
    for role, clock in times.items():
        raw = f"cell(cast({source.ref(columns.need(role))} as varchar))"
        select |= {role: clock.sql, f"{role}_bad": f"case when {clock.sql} is null then {raw} end"}
    for role in ("image", "image_url"):
        if (column := columns.get(role)) is not None and source.kinds.get(column, "text") in ("text", "nested", "null"):
            select[role] = _first(f"cell(cast({source.ref(column)} as varchar))")
    attributes = _attribute_columns(columns, say)
    select |= {f"a{number}": f"cell({_written(columns, column)})" for number, column in enumerate(attributes)}
    select = {ours: f"cast({sql} as varchar)" if ours == "item_id" else sql for ours, sql in select.items()}
    source.load("items", select, limit=limit)
    if not source.rows:
        raise UserError(f"no items ({source.path}); a catalogue needs at least one row", DATA)
    columns.describe()
    _check(data, columns)
    result = {"item_id": "item_id", "title": "title"}
    if "description" in select:
        result["description"] = "description"
    for role, clock in times.items():
        result[role] = _availability(data, columns, role, clock)
    if times:
        read_availability(
            Path(source.path),
            data.connection.sql(
                f"select {', '.join(f'{result[role]} as {role}' for role in times)} from items order by rowid"
            ).to_arrow_table(),
        )
    return result | _attributes(data, columns, attributes)


def _text(raw: str) -> str:
    """Returns SQL of a text; the parts of a list are joined by blanks."""
    x = f"cell(cast({raw} as varchar))"
    return (
        f"case when {x} = '[]' then null when regexp_matches({x}, '^\\[\\s*[''\"]') then coalesce(array_to_string(cell_list({x}), ' "
        f"'), {x}) else {x} end"
    )


def _first(x: str) -> str:
    """Returns SQL of a text or, of a list of texts, of its first one."""
    return f"case when {x} like '[%' then cell_list({x})[1] else {x} end"


def _attribute_columns(columns: Columns, say: Callable[[str], None]) -> list[str]:
    """Returns the columns of the file that become attributes."""
    source = columns.source
    read = {*columns.columns.values(), *(column.partition("/")[0] for column in columns.columns.values())}
    attributes = []
    for column in source.names:
        if column in read:
            continue
        if not column or column in ITEM_NAMES or source.kinds[column] in ("binary", "other", "null"):
            say(f"{source.path}: column `{column}` left out")
        else:
            attributes.append(column)
    return attributes


def _written(columns: Columns, column: str) -> str:
    """Returns SQL of a value as it would be written in CSV."""
    raw = columns.source.ref(column)
    if columns.source.kinds.get(column) != "time":
        return f"cast({raw} as varchar)"
    moment = f"make_timestamp({raw})"
    return (
        f"cast(cast({moment} as date) as varchar)" if pa.types.is_date(columns.source.arrow_type(column)) else f"cast({moment} as varchar)"
    )


def _check(data: Database, columns: Columns) -> None:
    source = columns.source
    row = data.one("select min(rowid) from items where item_id is null")[0]
    if row is not None:
        raise UserError(f"item_id is empty ({source.where(row)}); every row needs a short, printable item_id", DATA)
    check_ids_sql(data, "items", "item_id", "item_id", columns)
    twice = (
        "select item_id, list(rowid order by rowid) r from items group by item_id having count(*) > 1 order by list_extract(r, 2) limit 1"
    )
    if double := data.first(twice):
        item_id, (first, second, *_) = double
        raise UserError(f"item_id {item_id!r} is duplicated ({source.where(second)} and {source.where(first)}); keep one of them", DATA)


def _availability(data: Database, columns: Columns, role: str, clock: object) -> str:
    source = columns.source
    row, text = data.one(f"select min(rowid), arg_min({role}_bad, rowid) from items where {role}_bad is not null")
    if row is not None:
        raise UserError(f"`{columns.need(role)}` {text[:40]!r} is not a time ({source.where(row)}); give seconds or ISO 8601", DATA)
    sql, unit, _ = settle_unit(data, "items", role, clock, source, columns.need(role))  # type: ignore[arg-type]
    return f"cast(make_timestamp(cast(floor({sql} / {unit}) as bigint) * 1000000) as timestamp_s)"


def _attributes(data: Database, columns: Columns, attributes: list[str]) -> dict[str, str]:
    """Returns SQL of the attributes, each in the type that fits all its values."""
    if not attributes:
        return {}
    tests = []
    for number in range(len(attributes)):
        x = f"a{number}"
        tests.append(
            f"[count({x}), count(*) filter (regexp_full_match({x}, {INTEGER})), count(*) filter (regexp_full_match({x}, {NUMBER})), "
            f"count(*) filter (lower({x}) in ('true', 'false')), count(*) filter ({x} like '[%'), count(*) filter ({x} like '{{%'), "
            f"count(*) filter (contains({x}, '|')), count(*) filter (contains({x}, ' | '))]"
        )
    result = {}
    for number, (column, counts) in enumerate(zip(attributes, data.one(f"select {', '.join(tests)} from items"), strict=True)):
        x, (count, integers, numbers, booleans, lists, mappings, parted, loose) = f"a{number}", counts
        if not count:
            result[column] = f"cast({x} as varchar)"
        elif integers == count:
            result[column] = f"cast(split_part({x}, '.', 1) as bigint)"
        elif numbers == count:
            result[column] = f"cast({x} as double)"
        elif booleans == count:
            result[column] = f"cast({x} as boolean)"
        elif column in columns.source.lists:
            result[column] = f"string_split_regex({x}, '\\s+')"
        elif lists == count and _casts(data, columns, x, column, f"cell_list({x})"):
            result[column] = f"list_filter(list_transform(cell_list({x}), lambda y: cell(bare(y))), lambda y: y is not null)"
        elif mappings == count and _casts(data, columns, x, column, f"try_cast(try_cast({x} as json) as map(varchar, varchar))"):
            result[column] = f"cast(cast({x} as json) as map(varchar, varchar))"
        elif parted and not loose and _repeats(data, x):
            result[column] = f"list_filter(list_transform(string_split({x}, '|'), lambda y: cell(bare(y))), lambda y: y is not null)"
        else:
            result[column] = x
    return result


def _casts(data: Database, columns: Columns, x: str, column: str, sql: str) -> bool:
    """Returns whether all values are of a type. Raises `UserError` (3) for one that is nested without end."""
    deep = data.one(
        f"select min(rowid) from items where strlen({x}) - strlen(replace(replace({x}, '[', ''), '{{', '')) > {NESTED} and "
        f"regexp_matches({x}, '([\\[{{][^\\]}}]*){{{NESTED}}}')"
    )[0]
    if deep is not None:
        raise UserError(f"`{column}` is nested more than {NESTED} deep ({columns.source.where(deep)}); give a flat value", DATA)
    try:
        return bool(data.one(f"select count(*) = 0 from items where {x} is not null and {sql} is null")[0])
    except duckdb.Error:
        return False


def _repeats(data: Database, x: str) -> bool:
    """Returns whether the parts between bars occur again and again, as those of a list of genres, and not of a title."""
    parts, distinct = data.one(
        f"select count(t), count(distinct t) from (select unnest(string_split({x}, '|')) t from items where {x} is not null)"
    )
    return bool(distinct * 2 <= parts)


def select_sql(result: dict[str, str], extra: dict[str, str]) -> str:
    """Returns SQL of the rows to write, in the order of the files; `extra`: further columns."""
    columns = ", ".join(f"{sql} as {name(column)}" for column, sql in {**result, **extra}.items())
    return f"select {columns} from items order by rowid"


def plain(table: pa.Table) -> pa.Table:
    """Returns a table with the types of `items.parquet`: strings instead of views."""
    fields = []
    for one in table.schema:
        kind = one.type
        fields.append(pa.field(one.name, pa.string() if pa.types.is_string_view(kind) or pa.types.is_large_string(kind) else kind))
    return table.cast(pa.schema(fields))
