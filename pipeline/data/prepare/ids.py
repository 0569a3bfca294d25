"""Reads ids as texts, or as the whole numbers that they are in Parquet, and refuses those that are damaged."""

from pipeline.core.errors import DATA, UserError
from pipeline.data.parquet_checks import MAX_ID_BYTES
from pipeline.data.prepare.columns import NOT_IDS, Columns
from pipeline.data.prepare.database import BAD, quoted

CONTROL = r"[\x00-\x1f\x7f\x{80}-\x{9f}\x{2028}\x{2029}]"


def id_sql(columns: Columns, role: str) -> str:
    """Returns SQL of an id. Raises `UserError` (3) for a type that is none of ids."""
    source, column = columns.source, columns.need(role)
    kind, raw = source.kinds.get(column, "text"), source.ref(column)
    if kind in NOT_IDS:
        fault = f"column `{column}` has the wrong type, {source.arrow_type(column)} ({source.path}); ids are strings or whole numbers"
        raise UserError(fault, DATA)
    if kind in ("integer", "null"):
        return raw if kind == "integer" else "cast(null as varchar)"
    return f"{'number_id' if kind == 'float' or source.kind == 'json' else 'plain_id'}({source.text(column)})"


def check_ids_sql(columns: Columns, table: str, column: str, role: str) -> None:
    """Raises `UserError` (3) for the first id of a loaded column that is damaged, long or unprintable."""
    source, json = columns.source, columns.source.kind == "json"
    if source.data.one(f"select typeof({column}) from {table} limit 1")[0] != "VARCHAR":
        return
    nested = f"(regexp_matches({column}, '^[\\[{{]') and json_valid({column}))" if json else "false"
    odd = f"strlen({column}) > {MAX_ID_BYTES} or regexp_matches({column}, {quoted(CONTROL)}) or starts_with({column}, {BAD}) or {nested}"
    row, text = source.data.one(f"select min(rowid), arg_min({column}, rowid) from {table} where {odd}")
    if row is None:
        return
    place, theirs = source.where(row), columns.need(role)
    if json and text[0] in "[{":
        raise UserError(f"`{theirs}` is a list or an object ({place}); ids are strings or whole numbers", DATA)
    if not text.startswith("\1"):
        fault = f"is longer than {MAX_ID_BYTES} bytes" if len(text.encode()) > MAX_ID_BYTES else "has a control character"
        raise UserError(f"{role} {fault} ({place}); every row needs a short, printable {role}", DATA)
    number = float(text[1:])
    if number != int(number):
        raise UserError(f"`{theirs}` {text[1:]} is not an id ({place}); ids are strings or whole numbers", DATA)
    fault = f"`{theirs}` {number:.15g} is too large for a number with a point, and has lost digits"
    raise UserError(f"{fault} ({place}); give the ids as strings", DATA)
