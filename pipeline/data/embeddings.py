"""Defines the Parquet schema of the item embeddings, and reads the current version. No torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifact import MANIFEST, Version, damaged, following
from pipeline.core.config import Config
from pipeline.core.files import replacing

REFIT = "refit"  # subfolder of a run: the MLLM trained on all sessions (distill.refit), and its embeddings
ROW_GROUP = 1024  # rows in a row group: fixed, so that the same rows always give the same bytes
HALVES = ("knowledge", "transition")
Dtype = Literal["float32", "float16", "int8"]
VECTOR_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


def published_in(config: Config) -> str:
    """Returns the subfolder of a run with the embeddings that a published session model reads."""
    return REFIT if config.distill.refit else "."


def embeddings_schema(dim: int, dtype: Dtype, halves: Sequence[str] = HALVES) -> pa.Schema:
    """Returns the columns of an embeddings part, in this order; `dim` is the dimension D of each half.

    Values of type int8 are to be multiplied by their row's scale. An ablation may have one half only, listed in its manifest as
    `halves`.
    """
    vector = pa.list_(pa.field("element", VECTOR_TYPES[dtype], nullable=False), dim)
    scales = {f"{half}_scale": pa.float32() for half in halves if dtype == "int8"}
    columns = {
        "item_id": pa.string(),
        **dict.fromkeys(halves, vector),
        **scales,
        "has_image": pa.bool_(),
        "has_text": pa.bool_(),
        "n_tokens": pa.int32(),
        "content_sha256": pa.binary(32),  # of the content shown to the model: an update copies rows of equal content
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def vector_columns(half: str, values: np.ndarray, schema: pa.Schema) -> dict[str, pa.Array]:
    """Returns the columns of `schema` for the vectors `values` (N, D) float32 of a half."""
    columns = {}
    kind = schema.field(half).type
    if kind.value_type == pa.int8():
        scale = np.maximum(np.abs(values).max(1), np.finfo(np.float32).tiny) / np.float32(127)
        values = np.rint(values / scale[:, None])
        columns[f"{half}_scale"] = pa.array(scale, pa.float32())
    flat = pa.array(values.astype(kind.value_type.to_pandas_dtype()).reshape(-1))
    return columns | {half: pa.FixedSizeListArray.from_arrays(flat, type=kind)}


def vectors_of(table: pa.Table, half: str) -> np.ndarray:
    """Returns the vectors (N, D) of a half in the type of the file; int8 as float32, multiplied by the scales."""
    dim = table.schema.field(half).type.list_size
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[half].chunks]
    vectors = np.concatenate(values).reshape(-1, dim) if values else np.empty((0, dim), np.float32)
    return vectors * table[f"{half}_scale"].to_numpy()[:, None] if vectors.dtype == np.int8 else vectors


def write_part(path: Path, table: pa.Table) -> None:
    """Writes a part atomically. Its bytes depend on nothing but the rows (and the version of pyarrow)."""
    plain = table.replace_schema_metadata(None).combine_chunks()
    with replacing(path) as temporary:
        pq.write_table(
            plain,
            temporary,
            row_group_size=ROW_GROUP,
            compression="zstd",
            use_dictionary=False,  # ids are unique and vectors do not repeat
            write_statistics=False,
            write_page_checksum=True,
        )


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of N items, in catalogue order."""

    item_ids: list[str]
    vectors: dict[str, np.ndarray]  # half -> (N, D) float32, whatever the type in the files
    has_image: np.ndarray  # (N,) bool
    has_text: np.ndarray  # (N,) bool
    version: Version

    @property
    def knowledge(self) -> np.ndarray:
        return self.vectors["knowledge"]

    @property
    def transition(self) -> np.ndarray:
        return self.vectors["transition"]


def halves_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Returns the halves of an embeddings version: both, unless the manifest lists one. Raises ValueError for a wrong list."""
    halves = tuple(manifest.get("halves", HALVES))
    if not halves or halves != tuple(half for half in HALVES if half in halves):
        raise ValueError(f"halves: {halves}")
    return halves


def read_embeddings(root: Path) -> Embeddings:
    """Reads the current embeddings, in catalogue order. Raises `UserError` (4).

    Their manifest has `dim`, `dtype`, `rows` (N), `parts`: [{name, rows}] and, if there is only one half, `halves`.
    """
    hint = "run `tpad export-embeddings` first"
    return following(root, "embeddings", hint, lambda version: _embeddings(version, hint))


def _embeddings(version: Version, hint: str) -> Embeddings:
    try:
        dim, dtype, rows = (version.manifest[k] for k in ("dim", "dtype", "rows"))
        parts = [(p["name"], p["rows"]) for p in version.manifest["parts"]]
        halves = halves_of(version.manifest)
        schema = embeddings_schema(dim, dtype, halves)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(f"manifest lacks or has a wrong {error}", version.path / MANIFEST, hint) from None
    if not parts or rows != sum(n for _, n in parts):
        raise damaged(f"{rows} rows promised, {sum(n for _, n in parts)} in the parts", version.path / MANIFEST, hint)
    listed = {file["name"] for file in version.manifest["files"]}
    for name, count in parts:  # before memory is taken for what a manifest promises
        if name not in listed:
            raise damaged("file is missing", version.path / name, hint)
        with open_part(version.path / name, hint) as file:
            check_part(file.schema_arrow, file.metadata.num_rows, version.path / name, schema, count, hint)
    vectors = {half: np.empty((rows, dim), np.float32) for half in halves}
    flags = {flag: np.empty(rows, bool) for flag in ("has_image", "has_text")}
    item_ids: list[str] = []
    for name, count in parts:
        table = read_part(version.path / name, schema, count, hint)
        span = slice(len(item_ids), len(item_ids) + count)
        for half, filled in vectors.items():
            filled[span] = vectors_of(table, half)
            if not np.isfinite(filled[span]).all():
                raise damaged(f"{half} vectors that are not finite", version.path / name, hint)
        for flag, values in flags.items():
            values[span] = table[flag].to_numpy()
        item_ids += table["item_id"].to_pylist()
    if len(set(item_ids)) != rows:
        raise damaged("an item_id is duplicated", version.path, hint)
    return Embeddings(item_ids, vectors, flags["has_image"], flags["has_text"], version)


@contextmanager
def open_part(path: Path, hint: str) -> Iterator[pq.ParquetFile]:
    """Opens a part, whose pages are verified. Raises `UserError` (4), also for what reading it in the body finds."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise damaged("file is missing", path, hint) from None
    except (pa.ArrowException, OSError) as error:
        raise damaged(f"not a readable Parquet file: {error}", path, hint) from None


def check_part(found: pa.Schema, count: int, path: Path, schema: pa.Schema, rows: int, hint: str) -> None:
    """Raises `UserError` (4) for other columns or another number of rows than the manifest promises."""
    if not found.equals(schema):
        raise damaged("columns are not those of the manifest", path, hint)
    if count != rows:
        raise damaged(f"{rows} rows promised, {count} found", path, hint)


def read_part(path: Path, schema: pa.Schema, rows: int, hint: str) -> pa.Table:
    """Reads a part and verifies checksums, columns and number of rows. Raises `UserError` (4)."""
    with open_part(path, hint) as file:
        check_part(file.schema_arrow, file.metadata.num_rows, path, schema, rows, hint)
        table = file.read()
    if any(column.null_count for column in table.columns):
        raise damaged("empty values", path, hint)
    return table
