"""The trained session model over the items as they are now: what `tpad index` does. Nothing is trained.

An item that came after the training is known by its content alone, as any item without training events is. Its vector is
whitened as those of the training run were; the others keep their ids, counts and followers. The FAISS index is built anew,
which is also how another kind of index comes to a trained model.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from pipeline.artifact import OWN_KEYS, Version, canonical_json, open_verified, stage
from pipeline.catalog import load_catalog
from pipeline.embeddings import read_embeddings
from pipeline.errors import ARTIFACT, UserError
from recommender.inputs import SAME_VECTORS, check_catalogue, whitened
from recommender.published import load_model, write_model
from recommender.whitening import Whitening


@dataclass(frozen=True)
class Refreshed:
    version: Version
    added: int
    removed: int
    made: bool  # False: the session model already is over these embeddings, with this index


def refresh(run: Path, data: Path, setting: str = "auto", rebuild: bool = False) -> Refreshed:
    """Publishes `run/sbr` again, over the current embeddings of the items in `data`, with the index of `setting`."""
    before = open_verified(run / "sbr", "sbr", "run `tpad train-sbr` first")
    reads = before.manifest["embeddings_manifest_sha256"] is not None
    embeddings = read_embeddings(run / "embeddings") if reads else None
    catalog = load_catalog(data)
    source = embeddings.version.manifest_sha256 if embeddings else catalog.sha256
    if embeddings is not None:
        trained_on, made_of = before.manifest.get("vectors") or {}, embeddings.version.manifest
        if any(trained_on.get(key) != made_of.get(key) for key in SAME_VECTORS):
            what = "the session model was trained on vectors of another MLLM or image budget"
            raise UserError(f"{what} ({run}); run `tpad train-sbr`", ARTIFACT)
        check_catalogue(embeddings, catalog, run)
    same = source == before.manifest["embeddings_manifest_sha256" if reads else "catalogue_sha256"]
    if same and before.manifest.get("index", {}).get("setting") == setting and not rebuild:
        return Refreshed(before, 0, 0, made=False)
    skipped = set(before.manifest.get("skipped", []))  # items the model was not trained on for their images, whether it reads these or not
    item_ids = embeddings.item_ids if embeddings else [item for item in catalog.item_ids if item not in skipped]
    items = pq.read_table(before.path / "items.parquet", page_checksum_verification=True)
    old = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}
    rows = np.array([old.get(item_id, -1) for item_id in item_ids])
    arrays, whitening, content = load_file(before.path / "whitening.safetensors"), {}, None
    if embeddings is not None:
        whitening = {half: Whitening(*(arrays[f"{half}.{name}"] for name in Whitening._fields)) for half in embeddings.vectors}
        content = torch.as_tensor(whitened(embeddings, whitening))
    model = load_model(before.path).over(torch.as_tensor(rows), content)
    if not model.known.any():
        raise UserError(f"none of the items the session model was trained on is left ({data}); run `tpad train-sbr`", ARTIFACT)
    there = set(item_ids)
    samples = [[item for item in session if item in there] for session in json.loads((before.path / "samples.json").read_bytes())]
    samples = [session for session in samples if session] or [item_ids[:1]]
    kept = catalog.only(item_ids)
    trained = before.manifest["fingerprint"]
    counts = np.where(rows < 0, 0, items["count"].to_numpy()[rows])
    manifest = {key: value for key, value in before.manifest.items() if key not in OWN_KEYS} | {
        "fingerprint": trained if same else hashlib.sha256(canonical_json([trained, source])).hexdigest(),  # `tpad train-sbr` looks at it
        "embeddings_manifest_sha256": embeddings and embeddings.version.manifest_sha256,
        "embeddings_version": embeddings and embeddings.version.name,
        "catalogue_sha256": catalog.sha256,
    }
    manifest["model"] |= {"items": len(rows)}
    with stage(run / "sbr", "sbr") as staging:
        manifest["index"] = write_model(staging.path, model, kept, counts, samples, whitening, setting)
        for name in ("metrics.json", "ranks.parquet"):
            (staging.path / name).write_bytes((before.path / name).read_bytes())
        version = staging.publish(manifest)
    return Refreshed(version, int((rows < 0).sum()), len(old) - int((rows >= 0).sum()), made=True)
