"""The trained session model over the items as they are now: what `tpad index` does. Nothing is trained.

An item that came after the training is known by its content alone, as any item without training events is. Its vector is
whitened as those of the training run were; the others keep their ids, counts and followers. The FAISS index is built anew,
which is also how another kind of index comes to a trained model.
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

from pipeline.core.artifact import OWN_KEYS, Version, open_verified, stage
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
    """The published session model, and the items as they are now."""

    before: Version  # of the session model
    catalog: Catalog  # of the data folder, with the items that can be recommended alone
    embeddings: Embeddings | None  # None: the model knows items by their ids alone
    rows: np.ndarray  # (N,) which item of the published model each is; -1: a new one
    removed: int  # items of the published model that are gone
    source: str  # sha256 of what tells whether items have changed
    unchanged: bool

    @property
    def whitening(self) -> dict[str, Whitening]:
        """That of the training run, of each half."""
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
        """The published model over these items."""
        content = torch.as_tensor(whitened(self.embeddings, self.whitening)) if self.embeddings else None
        model = load_model(self.before.path).over(torch.as_tensor(self.rows), content)
        if not model.known.any():
            raise UserError(
                f"none of the items the session model was trained on is left ({self.catalog.path}); run `tpad train-sbr`", ARTIFACT
            )
        return model

    def samples(self) -> list[list[str]]:
        """The test sessions kept with the model, as far as their items are left."""
        samples = [
            [i for i in session if i in self.catalog.row] for session in json.loads((self.before.path / "samples.json").read_bytes())
        ]
        return [session for session in samples if session] or [self.catalog.item_ids[:1]]

    def publish(self, run: Path, model: SessionModel, counts: np.ndarray, setting: str, facts: dict[str, Any]) -> Version:
        """A version with another model, or with another index; figures stay those that they were. `facts` go into the manifest."""
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
    version: Version
    added: int
    removed: int
    made: bool  # False: the session model already is over these embeddings, with this index


def open_current(run: Path, data: Path) -> Current:
    """The published session model of a run and the items of a data folder. Raises `UserError` (4) where they do not go together."""
    before = open_verified(run / "sbr", "sbr", "run `tpad train-sbr` first")
    reads = before.manifest["embeddings_manifest_sha256"] is not None
    embeddings = read_embeddings(run / before.manifest.get("embeddings_run", ".") / "embeddings") if reads else None
    catalog = load_catalog(data)
    source = embeddings.version.manifest_sha256 if embeddings else catalog.sha256
    if embeddings is not None:
        trained_on, made_of = before.manifest.get("vectors") or {}, embeddings.version.manifest
        if any(trained_on.get(key) != made_of.get(key) for key in SAME_VECTORS):
            what = "the session model was trained on vectors of another MLLM or image budget"
            raise UserError(f"{what} ({run}); run `tpad train-sbr`", ARTIFACT)
        check_catalogue(embeddings, catalog, run)
    skipped = set(before.manifest.get("skipped", []))  # items the model was not trained on for their images, whether it reads these or not
    item_ids = embeddings.item_ids if embeddings else [item for item in catalog.item_ids if item not in skipped]
    items = pq.read_table(before.path / "items.parquet", columns=["item_id"], page_checksum_verification=True)
    old = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}
    rows = np.array([old.get(item_id, -1) for item_id in item_ids])
    unchanged = source == before.manifest["embeddings_manifest_sha256" if reads else "catalogue_sha256"]
    return Current(before, catalog.only(item_ids), embeddings, rows, len(old) - int((rows >= 0).sum()), source, unchanged)


def refresh(run: Path, data: Path, setting: str = "auto", new_items: float = 0.0, rebuild: bool = False) -> Refreshed:
    """Publishes `run/sbr` again, over the current embeddings of the items in `data`, with the index of `setting` and the default of
    `new_items`."""
    current = open_current(run, data)
    before, settings = current.before, current.before.manifest["settings"]
    same = current.unchanged and before.manifest.get("index", {}).get("setting") == setting and settings.get("new_items") == new_items
    if same and not rebuild:
        return Refreshed(before, 0, 0, made=False)
    trained = before.manifest["fingerprint"]  # `tpad train-sbr` looks at it
    facts = {
        "fingerprint": trained if current.unchanged else hashlib.sha256(canonical_json([trained, current.source])).hexdigest(),
        "settings": settings | {"new_items": new_items},
    }
    version = current.publish(run, current.model(), current.counts, setting, facts)
    return Refreshed(version, int((current.rows < 0).sum()), current.removed, made=True)
