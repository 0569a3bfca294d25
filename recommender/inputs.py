"""What the session models of a run are trained on: catalogue, split sessions and embeddings, read and held against each other."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.artifact import Version, canonical_json, read_embeddings
from pipeline.catalog import Catalog, Split, load_catalog, load_sessions, split_by_time
from pipeline.config import Config
from pipeline.errors import ARTIFACT, UserError
from recommender.evaluate import cases_of
from recommender.model import whiten
from recommender.sessions import Windows, pack


@dataclass(frozen=True)
class Inputs:
    """What all models of a run share."""

    catalog: Catalog
    split: Split
    content: np.ndarray  # (N, 2D) whitened
    counts: np.ndarray  # (N,) events in the training sessions
    embeddings: Version
    fingerprint: str

    def windows(self, max_prefix: int) -> tuple[Windows, Windows, Windows]:
        """Training, validation and test."""
        train = pack(self.split.train.rows, self.split.train.offsets, max_prefix, stride=max(max_prefix // 2, 1))
        return train, cases_of(self.split.valid, max_prefix), cases_of(self.split.test, max_prefix)


def load_inputs(config: Config, run: Path, data: Path) -> Inputs:
    """Everything read and held against each other: embeddings of another catalogue, or ones that have seen the test, are refused."""
    embeddings = read_embeddings(run / "embeddings")
    catalog = load_catalog(data)
    split = split_by_time(load_sessions(data, catalog), config.data.valid, config.data.test)
    made_of = embeddings.version.manifest
    if made_of["catalogue_sha256"] != catalog.sha256 or embeddings.item_ids != catalog.item_ids:
        raise UserError(f"embeddings are of another catalogue ({run / 'embeddings'}, {data}); run `tpad export-embeddings`", ARTIFACT)
    if made_of["sessions_sha256"] != split.train.ids_sha256():
        raise UserError(
            f"embeddings were distilled from other training sessions ({run / 'embeddings'}, {data}); "
            "run `tpad distill` and `tpad export-embeddings` with the same data, data.valid and data.test",
            ARTIFACT,
        )
    counts = np.bincount(split.train.rows, minlength=len(catalog))
    content = np.concatenate([whiten(half, counts > 0) for half in (embeddings.knowledge, embeddings.transition)], axis=1)
    return Inputs(catalog, split, content, counts, embeddings.version, fingerprint(config, catalog, split, embeddings.version))


def fingerprint(config: Config, catalog: Catalog, split: Split, embeddings: Version) -> str:
    digest = hashlib.sha256()
    for log in (split.train, split.valid, split.test):
        digest.update(canonical_json(log.session_ids) + log.offsets.tobytes() + log.rows.tobytes())
    settings = {"sbr": config.sbr.model_dump(), "seed": config.seed, "max_prefix": config.data.max_prefix}
    return hashlib.sha256(
        canonical_json(settings | {"sessions": digest.hexdigest(), "catalogue": catalog.sha256, "embeddings": embeddings.manifest_sha256})
    ).hexdigest()
