"""Writes and loads the files of a published session model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from pipeline.core.files import canonical_json
from pipeline.data.catalog import Catalog
from recommender.retrieval.index import ItemIndex, build_indexes, save_indexes
from recommender.retrieval.index_tuning import describe
from recommender.retrieval.mapped_files import write_mapped_items
from recommender.session_model.config import config_of
from recommender.session_model.model import SessionModel
from recommender.session_model.numpy_model import NumpySessionModel
from recommender.session_model.whitening import Whitening


def write_model(
    folder: Path,
    model: SessionModel,
    catalog: Catalog,
    counts: np.ndarray,
    samples: Sequence[Sequence[str]],
    whitening: dict[str, Whitening],
    setting: str,
) -> dict[str, Any]:
    """Writes the model's weights and settings, its items with their attributes, the index of `setting`, sample sessions (item_ids), and the
    whitening, which items that are added later need. Returns the manifest entry of the index."""
    model = model.cpu().eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    axes = {f"{half}.{name}": array for half, fitted in whitening.items() for name, array in fitted._asdict().items()}
    save_arrays(axes, folder / "whitening.safetensors")
    (folder / "config.json").write_bytes(canonical_json(asdict(model.config)))
    (folder / "samples.json").write_bytes(canonical_json(samples))
    items = {"item_id": pa.array(catalog.item_ids, pa.string()), "title": catalog.titles, "count": pa.array(counts, pa.int64())}
    items |= catalog.availability.columns() if catalog.availability else {}
    tables = {"items": pa.table(items), "attributes": pa.table(catalog.attributes())}
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", write_page_checksum=True)
    write_mapped_items(folder, tables)
    numpy_model = NumpySessionModel.of(model)
    indexes = build_indexes(numpy_model, setting)
    save_indexes(indexes, folder)
    sessions = [[catalog.row[item] for item in session] for session in samples]
    return describe(ItemIndex(indexes, numpy_model), setting, sessions)


def load_model(folder: Path) -> SessionModel:
    return SessionModel.restored(config_of(folder), load_file(folder / "model.safetensors"))
