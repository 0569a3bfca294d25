"""Checks Parquet files: readable, with the required columns and types, and valid ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, UserError
from pipeline.data.clock import PREPARE

MAX_ID_BYTES = 512
CONTROL = "[\\x00-\\x1f\\x7f\\x{80}-\\x{9f}\\x{2028}\\x{2029}]"  # in the syntax of RE2, which Arrow uses


def raise_duplicate(item_ids: list[str], where: Callable[[int], str]) -> None:
    """Raises `UserError` (3) for the first duplicate; `where(row)` names a row."""
    first: dict[str, int] = {}
    for row, item_id in enumerate(item_ids):
        if item_id in first:
            raise UserError(f"item_id {item_id!r} is duplicated ({where(row)} and {where(first[item_id])}); keep one of them", DATA)
        first[item_id] = row


def open_parquet(path: Path, hint: str, name: str | None = None) -> pq.ParquetFile:
    """Opens a Parquet file. Raises `UserError` (3), which names it `name`; `hint` says what to do about a missing one."""
    if not path.is_file():
        raise UserError(f"{path.name} not found ({path}); {hint}", DATA)
    try:
        return parquet_file(path, None)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(name or path, error) from None


def parquet_file(path: Path, metadata: Any) -> pq.ParquetFile:
    """Opens a Parquet file for reading by row group; without pre_buffer, which would hold all groups read so far."""
    return pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True, pre_buffer=False, buffer_size=2**20)


def unreadable(path: Path | str, error: Exception) -> UserError:
    """Returns the error (3) for a damaged Parquet file."""
    return UserError(f"not readable as Parquet: {str(error).rstrip('.')[:200]} ({path}); write the file again", DATA)


def need_columns(path: Path, schema: pa.Schema, wanted: dict[str, Any]) -> None:
    """Raises `UserError` (3) for a missing, duplicated or wrong column. `wanted`: column -> test of its Arrow type."""
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UserError(f"column `{name}` is duplicated ({path}); keep one", DATA)
    for name, fits in wanted.items():
        if name not in schema.names:
            raise UserError(f"column `{name}` is missing ({path} has {', '.join(schema.names[:20])}); {PREPARE}", DATA)
        if not fits(schema.field(name).type):
            raise UserError(f"column `{name}` has the wrong type, {schema.field(name).type} ({path}); {PREPARE}", DATA)


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def inner(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a list's values; any other type as it is."""
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_image(kind: pa.DataType) -> bool:
    """Returns whether the type is struct<bytes: binary, path: string>, of which either field may be absent."""
    if not pa.types.is_struct(kind):
        return False
    parts = {part.name: part.type for part in kind}
    fits = {"bytes": is_binary, "path": is_text}
    return bool(parts) and all(name in fits and (fits[name](part) or pa.types.is_null(part)) for name, part in parts.items())


def has_binary(kind: pa.DataType) -> bool:
    """Returns whether the type is binary or contains binary values."""
    if pa.types.is_dictionary(kind):
        return is_binary(kind.value_type)
    nested = [kind.field(i).type for i in range(kind.num_fields)]
    return is_binary(kind) or bool(pa.types.is_fixed_size_binary(kind)) or any(has_binary(part) for part in nested)


def check_ids(ids: pa.ChunkedArray, name: str, where: Callable[[int], str]) -> None:
    """Raises `UserError` (3) for an empty, long or unprintable id; `where(row)` names a row."""
    ids = ids.cast(pa.large_string())
    faults = {
        "is empty": pc.fill_null(pc.equal(pc.binary_length(pc.utf8_trim_whitespace(ids)), 0), True),
        f"is longer than {MAX_ID_BYTES} bytes": pc.fill_null(pc.greater(pc.binary_length(ids), MAX_ID_BYTES), False),
        "has a control character": pc.fill_null(pc.match_substring_regex(ids, CONTROL), False),
    }
    for fault, bad in faults.items():
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise UserError(f"{name} {fault} ({where(row)}); every row needs a short, printable {name}", DATA)
