"""Batch export: every item through the unified MLLM once, into a published version of `run/embeddings`.

The catalogue is cut into shards of fixed rows. A shard is computed whole, by one process, and sorted by length only
inside itself, so its bytes do not depend on how many processes there are or how often the export was interrupted.
Finished shards of an interrupted export of the same model and catalogue are kept; any other is computed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline import prompts
from pipeline.artifact import Staging, Version, canonical_json, embeddings_schema, open_verified, published, stage, write_part
from pipeline.catalog import Catalog, load_catalog
from pipeline.config import BackboneConfig, Config, DataConfig
from pipeline.errors import ARTIFACT, UserError
from pipeline.mllm import Encoder, Mllm, embed, load_mllm
from pipeline.progress import Steps
from pipeline.prompts import Prompts


@dataclass(frozen=True)
class Exported:
    version: Version
    rows: int
    dim: int
    made: bool  # False: the published version already was of this model and catalogue


def export(config: Config, run: Path, data: Path) -> Exported:
    """Item embeddings e(v) = [k(v) ; p(v)] of a data folder's items by `run/mllm`. Raises `UserError`."""
    model = open_verified(run / "mllm", "mllm", "run `tpad distill` first")
    catalog = load_catalog(data)
    facts = {"catalogue_sha256": catalog.sha256, "mllm_sha256": model.manifest_sha256, "dtype": config.export.dtype}
    layout = {"shard_rows": config.export.shard_rows, "token_budget": config.export.token_budget}
    fingerprint = hashlib.sha256(canonical_json(facts | layout)).hexdigest()
    before = published(run / "embeddings", "embeddings")
    if before is not None and before.manifest["fingerprint"] == fingerprint:
        return Exported(before, before.manifest["rows"], before.manifest["dim"], made=False)
    if model.manifest["catalogue_sha256"] != catalog.sha256:
        # new items are welcome: their content is all the model needs
        facts["distilled_on_catalogue_sha256"] = model.manifest["catalogue_sha256"]
    mllm, backbone, settings = load_mllm(model.path)
    if settings["prompts"] != prompts.VERSION:
        raise UserError(
            f"the MLLM was trained with prompts of version {settings['prompts']} ({model.path}); run `tpad distill` again", ARTIFACT
        )
    accelerator = Accelerator()
    mllm.to(accelerator.device).eval()
    views = Prompts(catalog, DataConfig.model_validate(settings["data"]))
    encoder = Encoder(BackboneConfig.model_validate(settings["backbone"]), backbone, catalog, cache_bytes=0)
    firsts = range(0, len(catalog), config.export.shard_rows)
    parts = [
        (f"part-{n:05d}.parquet", np.arange(first, min(first + config.export.shard_rows, len(catalog)))) for n, first in enumerate(firsts)
    ]

    def work(folder: Path) -> None:
        mine = parts[accelerator.process_index :: accelerator.num_processes]
        with Steps("export", sum(len(rows) for _, rows in mine), show=accelerator.is_main_process) as progress:
            for name, rows in mine:
                if not _finished(folder / name, catalog, rows):
                    write_part(folder / name, _shard(rows, mllm, encoder, views, config, accelerator.device))
                progress.advance(by=len(rows))
        accelerator.wait_for_everyone()

    def publish(staging: Staging) -> Version:
        manifest = facts | {
            "fingerprint": fingerprint,
            "rows": len(catalog),
            "dim": settings["dim"],
            "metric": "cosine",
            "parts": [{"name": name, "rows": len(rows)} for name, rows in parts],
            "backbone": Path(settings["backbone"]["name"]).name,  # of a local folder, its name
            "revision": settings["backbone"]["revision"],
            "weights_sha256": next(f["sha256"] for f in model.manifest["files"] if f["name"] == "weights.safetensors"),
            "prompts": {"version": prompts.VERSION, "text": views.shown},
            "pooling": "last attended token",
            "max_pixels": settings["backbone"]["max_pixels"],
            "sessions_sha256": model.manifest["sessions_sha256"],
        }
        return staging.publish(manifest, config.export.keep)

    if accelerator.is_main_process:
        with stage(run / "embeddings", "embeddings", fingerprint) as staging:
            broadcast_object_list([str(staging.path)])
            work(staging.path)
            version = publish(staging)
    else:
        folder = [""]
        broadcast_object_list(folder)
        work(Path(folder[0]))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        version = open_verified(run / "embeddings", "embeddings", "")
    return Exported(version, len(catalog), settings["dim"], made=True)


def _finished(path: Path, catalog: Catalog, rows: np.ndarray) -> bool:
    """Whether an interrupted export of the same fingerprint left this part whole."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return bool(file.read()["item_id"].to_pylist() == [catalog.item_ids[row] for row in rows])
    except (OSError, pa.ArrowException):
        return False


def _shard(rows: np.ndarray, mllm: Mllm, encoder: Encoder, views: Prompts, config: Config, device: Any) -> pa.Table:
    sequences = [encoder.encode(views.item(int(row))) for row in rows]
    features = embed(mllm, encoder, sequences, ("knowledge", "transition"), config.export.token_budget, device)
    dim = features["knowledge"].shape[1]
    schema = embeddings_schema(dim, config.export.dtype)
    columns = {
        "item_id": [encoder.catalog.item_ids[row] for row in rows],
        "has_image": [views.has_image(int(row)) for row in rows],
        "has_text": [bool(views.text(int(row))) for row in rows],
        "n_tokens": [len(s) for s in sequences],
    }
    for half, values in features.items():
        if not (finite := np.isfinite(values).all(1)).all():
            item = columns["item_id"][int(np.argmin(finite))]
            raise UserError(f"the MLLM gives features that are not finite (item {item}); run `tpad distill --fresh`", ARTIFACT)
        flat = pa.array(values.astype(config.export.dtype).reshape(-1))
        columns[half] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field(half).type)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)
