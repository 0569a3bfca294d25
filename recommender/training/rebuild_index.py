"""Publishes the trained session model over the current items, without training: `tpad index`.

An item added after the training is a cold item, scored by its content alone. Its vector is whitened like those of the training run;
the other items keep their ids, counts and next-item counts. The FAISS index is rebuilt, so this also changes the kind of index.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from pipeline.core.artifact import OWN_KEYS, Version, decoding, following, settle, stage
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import canonical_json
from pipeline.data.catalog import Catalog, load_catalog
from pipeline.data.embeddings import Embeddings, read_embeddings
from recommender.retrieval.saved_model import load_model, write_model
from recommender.session_model.model import SessionModel
from recommender.session_model.whitening import Whitening
from recommender.training.dataset import SAME_VECTORS, check_catalogue, whitened


@dataclass(frozen=True)
class Current:
    """The published session model and the current items."""

    before: Version  # of the session model
    catalog: Catalog  # of the data folder, only the items that can be recommended
    data_catalog: Catalog  # of the data folder, all items
    embeddings: Embeddings | None  # None: the model reads only ids
    rows: np.ndarray  # (N,) row of each item in the published model; -1: a new item
    removed: int  # items of the published model that are no longer in the catalogue
    source: str  # sha256 of the embeddings or the catalogue: another one means that items have changed
    unchanged: bool

    @property
    def whitening(self) -> dict[str, Whitening]:
        """half -> the whitening of the training run."""
        arrays = load_file(self.before.path / "whitening.safetensors") if self.embeddings else {}
        halves = self.embeddings.vectors if self.embeddings else {}
        return {half: Whitening(*(arrays[f"{half}.{name}"] for name in Whitening._fields)) for half in halves}

    @property
    def counts(self) -> np.ndarray:
        """(N,) events in the sessions that the published model was trained on."""
        items = pq.read_table(self.before.path / "items.parquet", columns=["count"], page_checksum_verification=True)
        counts: np.ndarray = np.where(self.rows < 0, 0, items["count"].to_numpy()[self.rows])
        return counts

    def model(self) -> SessionModel:
        """Returns the published model over the current items. Raises `UserError` (4)."""
        content = torch.as_tensor(whitened(self.embeddings, self.whitening)) if self.embeddings else None
        model = load_model(self.before.path).over(torch.as_tensor(self.rows), content)
        if not model.known.any():
            raise UserError(
                f"none of the items the session model was trained on is left ({self.catalog.path}); run `tpad train-sbr`", ARTIFACT
            )
        return model

    def samples(self) -> list[list[str]]:
        """Returns the test sessions that are stored with the model, without items that are no longer in the catalogue."""
        samples = [
            [i for i in session if i in self.catalog.row] for session in json.loads((self.before.path / "samples.json").read_bytes())
        ]
        return [session for session in samples if session] or [self.catalog.item_ids[:1]]

    def publish(self, run: Path, model: SessionModel, counts: np.ndarray, setting: str, facts: dict[str, Any]) -> Version:
        """Publishes a version with `model` and an index of `setting`; its metrics are copied. `facts` go into the manifest."""
        version = self.embeddings.version if self.embeddings else None
        manifest = {key: value for key, value in self.before.manifest.items() if key not in OWN_KEYS} | {
            "embeddings_manifest_sha256": version and version.manifest_sha256,
            "embeddings_version": version and version.name,
            "catalogue_sha256": self.catalog.sha256,
            **facts,
        }
        manifest["model"] |= {"items": len(self.rows)}
        with stage(run / "sbr", "sbr") as staging:
            manifest["index"] = write_model(staging.path, model, self.catalog, counts, self.samples(), self.whitening, setting)
            for name in ("metrics.json", "ranks.parquet"):
                (staging.path / name).write_bytes((self.before.path / name).read_bytes())
            return staging.publish(manifest)


@dataclass(frozen=True)
class Refreshed:
    """The result of `refresh`."""

    version: Version
    added: int
    removed: int
    made: bool  # False: the published version already has these items and this index


def open_current(run: Path, data: Path) -> Current:
    """Opens the published session model of a run and the items of a data folder. Raises `UserError` (4) if they do not match."""
    settle(run / "sbr")
    return following(run / "sbr", "sbr", "run `tpad train-sbr` first", lambda before: _open(run, data, before))


def _open(run: Path, data: Path, before: Version) -> Current:
    reads = before.manifest["embeddings_manifest_sha256"] is not None
    embeddings = read_embeddings(run / before.manifest.get("embeddings_run", ".") / "embeddings") if reads else None
    catalog = load_catalog(data)
    source = embeddings.version.manifest_sha256 if embeddings else catalog.sha256
    if embeddings is not None:
        trained_on, manifest = before.manifest.get("vectors") or {}, embeddings.version.manifest
        if any(trained_on.get(key) != manifest.get(key) for key in SAME_VECTORS):
            fault = "the session model was trained on vectors of another MLLM or image budget"
            raise UserError(f"{fault} ({run}); run `tpad train-sbr`", ARTIFACT)
        check_catalogue(embeddings, catalog, run)
    skipped = set(before.manifest.get("skipped", []))  # items that were excluded from the training for their images
    item_ids = embeddings.item_ids if embeddings else [item for item in catalog.item_ids if item not in skipped]
    items = pq.read_table(before.path / "items.parquet", columns=["item_id"], page_checksum_verification=True)
    old = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}
    rows = np.array([old.get(item_id, -1) for item_id in item_ids])
    unchanged = source == before.manifest["embeddings_manifest_sha256" if reads else "catalogue_sha256"]
    return Current(before, catalog.only(item_ids), catalog, embeddings, rows, len(old) - int((rows >= 0).sum()), source, unchanged)


def refresh(run: Path, data: Path, setting: str = "auto", new_items: float = 0.0, rebuild: bool = False) -> Refreshed:
    """Publishes `run/sbr` again over the current embeddings of the items in `data`, with an index of `setting` and the default
    `new_items`; does nothing if the published version has all that, unless `rebuild`. Raises `UserError`."""
    current = open_current(run, data)
    with decoding(current.before.path, "run `tpad train-sbr`"):
        return _refreshed(run, current, setting, new_items, rebuild)


def _refreshed(run: Path, current: Current, setting: str, new_items: float, rebuild: bool) -> Refreshed:
    before, settings = current.before, current.before.manifest["settings"]
    same = current.unchanged and before.manifest.get("index", {}).get("setting") == setting and settings.get("new_items") == new_items
    if same and not rebuild:
        return Refreshed(before, 0, 0, made=False)
    trained = before.manifest["fingerprint"]  # read by `tpad train-sbr`
    facts = {
        "fingerprint": trained if current.unchanged else hashlib.sha256(canonical_json([trained, current.source])).hexdigest(),
        "settings": settings | {"new_items": new_items},
    }
    version = current.publish(run, current.model(), current.counts, setting, facts)
    return Refreshed(version, int((current.rows < 0).sum()), current.removed, made=True)
