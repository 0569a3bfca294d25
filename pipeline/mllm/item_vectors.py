"""Takes a table of item vectors that exist already as a backbone without layers: `backbone.name: vectors`.

The vectors may be of any encoder. An item is one token, whose hidden state is its vector (`vector_prompts.py`); so `tpad distill` trains
heads alone, and all later steps work as with any other backbone.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.core.config import BackboneConfig
from pipeline.core.errors import DATA, UserError
from pipeline.core.files import sha256_file
from pipeline.data.catalog import Catalog
from pipeline.data.parquet_checks import check_ids, is_text, raise_duplicate, unreadable

VECTORS = "vectors"  # backbone.name
DROPOUT = 0.1  # of the vectors' numbers in training


class VectorModel(nn.Module):
    """A model whose last hidden states are its input, in training with dropout. It has no weights."""

    def __init__(self, table: "ItemVectors") -> None:
        super().__init__()
        self.table, self.config, self.dtype = table, PretrainedConfig(hidden_size=table.vectors.shape[1]), torch.float32

    @property
    def model(self) -> "VectorModel":
        return self

    def forward(self, vectors: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=nn.functional.dropout(vectors, DROPOUT, self.training))

    def get_decoder(self) -> nn.Module:
        return nn.Module()

    def get_output_embeddings(self) -> nn.Module:
        return nn.Module()


class ItemVectors:
    """The vectors of one catalogue's items, from the file `backbone.path`.

    A Parquet file has a column `item_id` and one column of lists of numbers. A NumPy file `NAME.npy` (n, d) has its ids beside it, in
    `NAME.txt`, one a line. Raises `UserError` (3) for another file, an item without a vector, and a number that is not finite.
    """

    def __init__(self, config: BackboneConfig, catalog: Catalog) -> None:
        assert config.path is not None, "the settings have checked that"
        self.path = Path(config.path)
        item_ids, vectors = _read(self.path)
        row_of = {item_id: row for row, item_id in enumerate(item_ids)}
        missing = [item_id for item_id in catalog.item_ids if item_id not in row_of]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(catalog)} items have no vector, e.g. item_id {missing[0]!r} ({self.path}, backbone.path); "
                "add them, or remove the items",
                DATA,
            )
        self.vectors = vectors[[row_of[item_id] for item_id in catalog.item_ids]]  # (N, d) float32
        finite = np.isfinite(self.vectors).all(1)
        if not finite.all():
            item_id = catalog.item_ids[int(np.argmin(finite))]
            raise UserError(f"the vector of item_id {item_id!r} has a number that is not finite ({self.path}); write it again", DATA)


def table_sha256(config: BackboneConfig) -> str:
    """Hashes the file of vectors. Raises `UserError` (3)."""
    assert config.path is not None, "the settings have checked that"
    if not Path(config.path).is_file():
        raise _missing(Path(config.path))
    return sha256_file(Path(config.path))


def _missing(path: Path) -> UserError:
    return UserError(f"no such table of vectors ({path}, backbone.path); give a .parquet or .npy file", DATA)


def _read(path: Path) -> tuple[list[str], np.ndarray]:
    """Reads the ids and vectors (n, d) of a file."""
    if not path.is_file():
        raise _missing(path)
    item_ids, vectors = _read_npy(path) if path.suffix == ".npy" else _read_parquet(path)
    raise_duplicate(item_ids, lambda row: f"{path} row {row}")
    return item_ids, vectors


def _read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    names = path.with_suffix(".txt")
    try:
        with open(path, "rb") as file:
            vectors = np.lib.format.read_array(file, allow_pickle=False)
        item_ids = names.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the vectors: {error} (backbone.path); give {path.name} and {names.name}, an id a line", DATA
        ) from None
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or len(vectors) != len(item_ids):
        raise UserError(
            f"{path.name} holds {vectors.dtype} of shape {vectors.shape}, {names.name} {len(item_ids)} ids ({path}); give one row an id",
            DATA,
        )
    return item_ids, vectors.astype(np.float32)


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    lists = [field.name for field in table.schema if _is_vector(field.type)]
    if "item_id" not in table.column_names or len(lists) != 1:
        raise UserError(
            f"a table of vectors has `item_id` and one column of lists of numbers ({path} has {', '.join(table.column_names[:20])})", DATA
        )
    ids = table["item_id"]
    if not is_text(ids.type):
        ids = ids.cast(pa.string())  # ids are strings everywhere
    check_ids(ids, "item_id", lambda row: f"{path} row {row}")
    vectors = table[lists[0]].to_numpy()
    lengths = {len(vector) if vector is not None else -1 for vector in vectors}
    if len(lengths) != 1 or min(lengths) < 1:
        raise UserError(f"the vectors of `{lists[0]}` differ in length ({path}: {sorted(lengths)[:5]}); give each as many numbers", DATA)
    return ids.to_pylist(), np.stack(vectors).astype(np.float32)


def _is_vector(kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(listed and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))
