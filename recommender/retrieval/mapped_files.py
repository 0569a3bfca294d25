"""Reads the files of a published session model as memory maps: processes on one machine share them, and only what is read takes memory.

Of a large catalogue (`LARGE_ITEMS`) the items lie beside their Parquet file as uncompressed Arrow, which can be mapped, and their rows in
the order of their ids, so that finding an id needs no table in memory. Mapped files may be deleted while they are in use.
"""

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recommender.session_model.numpy_model import LARGE_ITEMS

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
ORDER = "items-by-id.npy"
CHECKED_AT_ONCE = 2**20  # bytes


def mapped_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file, read-only and mapped. Raises ValueError if it is none, or has numbers that are not finite.

    The format: 8 bytes for the length of the header, which is JSON with the type, shape and place of each tensor, then the numbers.
    """
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            flat = np.frombuffer(content, dtype, (last - first) // dtype.itemsize, begin + first) if last > first else np.empty(0, dtype)
            tensors[name] = flat.reshape(entry["shape"])
            if dtype.kind == "f":
                _check_finite(path, name, dtype, begin + first, last - first)
    return tensors


def _check_finite(path: Path, name: str, dtype: np.dtype[Any], begin: int, size: int) -> None:
    """Raises ValueError for numbers that are not finite in `size` bytes of a file. They are read in pieces and not through the map, all of
    whose pages would then be resident."""
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        piece = memoryview(bytearray(CHECKED_AT_ONCE))
        while size and (count := file.readinto(piece[:size])):
            if not np.isfinite(np.frombuffer(piece[:count], dtype)).all():
                raise ValueError(f"{name} has numbers that are not finite")
            size -= count


def write_mapped_items(folder: Path, tables: Mapping[str, pa.Table]) -> None:
    """Writes the forms that can be mapped of items.parquet and attributes.parquet, for a large catalogue."""
    if len(tables["items"]) < LARGE_ITEMS:
        return
    for name, table in tables.items():
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())
    order = pc.sort_indices(tables["items"]["item_id"]).to_numpy().astype(np.int32)
    with open(folder / ORDER, "wb") as file:
        np.lib.format.write_array(file, order, allow_pickle=False)


def read_items(folder: Path, name: str) -> pa.Table:
    """Reads `items` or `attributes` of a published session model; mapped, where the catalogue is large."""
    path = folder / f"{name}.arrow"
    if path.exists():
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return pq.ParquetFile(folder / f"{name}.parquet", page_checksum_verification=True).read()  # not by read_table, which imports pandas


class MappedTexts(Sequence[str]):
    """The texts of a column, each read when it is asked for; of an empty one, that of the column `otherwise`."""

    def __init__(self, column: pa.ChunkedArray, otherwise: pa.ChunkedArray | None = None) -> None:
        self.column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        self.otherwise = None if otherwise is None else MappedTexts(otherwise)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # no slices
        text: str | None = self.column[int(row)].as_py()
        return text or (self.otherwise[row] if self.otherwise is not None else "")

    def __len__(self) -> int:
        return len(self.column)


class MappedRows(Mapping[str, int]):
    """item_id -> row, by binary search in the rows `order` (N,) sorted by id, as UTF-8."""

    def __init__(self, item_ids: MappedTexts, order: np.ndarray) -> None:
        self.item_ids, self.order = item_ids, order

    def __getitem__(self, item_id: str) -> int:
        wanted, low, high = item_id.encode("utf-8", "surrogatepass"), 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            if self.item_ids[self.order[middle]].encode() < wanted:
                low = middle + 1
            else:
                high = middle
        if low < len(self.order) and self.item_ids[self.order[low]] == item_id:
            return int(self.order[low])
        raise KeyError(item_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self.item_ids)

    def __len__(self) -> int:
        return len(self.order)


def names_and_rows(folder: Path, items: pa.Table) -> tuple[Sequence[str], Sequence[str], Mapping[str, int]]:
    """Returns the item_ids, the titles (an item without one has its id) and item_id -> row."""
    if (folder / ORDER).exists():
        item_ids = MappedTexts(items["item_id"])
        order = np.lib.format.open_memmap(folder / ORDER, mode="r")
        return item_ids, MappedTexts(items["title"], items["item_id"]), MappedRows(item_ids, np.asarray(order))
    names: list[str] = items["item_id"].to_pylist()
    titles = [title or item_id for title, item_id in zip(items["title"].to_pylist(), names, strict=True)]
    return names, titles, {item_id: row for row, item_id in enumerate(names)}
