"""Loads the training data of session models: catalogue, split sessions and embeddings, checked against each other."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.core.artifact import Version
from pipeline.core.config import Config
from pipeline.core.errors import ARTIFACT, DATA, UserError
from pipeline.core.files import canonical_json
from pipeline.data.availability import Availability
from pipeline.data.catalog import Catalog, load_catalog
from pipeline.data.embeddings import Embeddings, published_in, read_embeddings
from pipeline.data.session_log import SessionLog, load_sessions
from pipeline.data.split import Split, split_sessions, split_window
from recommender.baselines.registry import MODELS, chosen
from recommender.session_model.config import FORM
from recommender.session_model.whitening import Whitening, fit_whitening
from recommender.session_model.windows import Windows, cases_of, training_windows

PUBLICATION = {"index", "models", "seeds", "refit", "new_items"}  # settings without effect on a trained model
SAME_VECTORS = (
    "mllm_sha256",
    "prompts_version",
    "max_pixels",
    "layers",
    "neighbours",
)  # manifest keys: if equal, equal content gives equal vectors


@dataclass(frozen=True)
class TrainingData:
    """The data that all models of a run are trained and tested on."""

    catalog: Catalog
    split: Split
    content: np.ndarray | None  # (N, 2K) whitened, or (N, K) of embeddings with one half
    whitening: dict[str, Whitening]  # half -> its whitening
    counts: np.ndarray  # (N,) events in the training sessions
    embeddings: Version | None  # None, like `content`, if no model reads them
    fingerprint: str  # of the catalogue and of the split and shortened sessions

    @property
    def available(self) -> Availability | None:
        """The times at which items may be recommended; None: always."""
        return self.catalog.availability

    @property
    def available_in_validation(self) -> Availability | None:
        """The availability for validation: excludes cold items that never occur there, as they may have been launched later."""
        absent = self.counts == 0
        absent[self.split.valid.rows] = False
        limits = self.available
        if not absent.any():
            return limits
        return (Availability.unlimited(len(self.counts)) if limits is None else limits).without(absent)

    def windows(self, max_prefix: int) -> tuple[Windows, Windows, Windows]:
        """Returns the windows of training, validation and test."""
        split, timed = self.split, self.available is not None
        valid, test = (cases_of(log, max_prefix, timed) for log in (split.valid, split.test))
        return training_windows(split.train, max_prefix, timed), valid, test


def load_training_data(
    config: Config, run: Path, data: Path, everything: bool = False, window: tuple[int, int] | None = None
) -> TrainingData:
    """Loads the training data of a run. Raises `UserError` for embeddings of another catalogue, or that have seen the test sessions.

    Embeddings are read only if a model of `sbr.models` reads them. With `everything`, all sessions are for training, as for the published
    model; the vectors are then those of the held-out MLLM or, with `distill.refit`, of the one trained on all sessions. `window` (number,
    count) splits the log by `split_window`."""
    run = run / published_in(config) if everything else run
    embeddings = read_embeddings(run / "embeddings") if any(MODELS[name].content for name in chosen(config.sbr.models)) else None
    catalog = load_catalog(data)
    if embeddings is not None:
        check_catalogue(embeddings, catalog, run)
    log = load_sessions(data, catalog)
    split = split_sessions(log, config.data)
    allowed = log if everything and config.distill.refit else split.train  # the sessions that the MLLM may have been trained on
    manifest = embeddings.version.manifest if embeddings is not None else {}
    if everything:
        split = replace(split, train=log)
    if window is not None:
        split = split_window(log, config.data, *window)
    if embeddings is not None and manifest.get("sessions_sha256") != allowed.ids_sha256():
        raise UserError(
            f"embeddings were distilled from other training sessions ({run / 'embeddings'}, {data}); "
            "run `tpad distill` and `tpad export-embeddings` with the same data, data.protocol, data.valid and data.test",
            ARTIFACT,
        )
    if manifest.get("skipped"):
        catalog, split = without_skipped(catalog, split, set(manifest["skipped"]))
    counts = np.bincount(split.train.rows, minlength=len(catalog))
    vectors = embeddings.vectors if embeddings is not None else {}
    settings = config.sbr
    whitening = {half: fit_whitening(vectors[half], counts > 0, settings.components, settings.parts.whitening) for half in vectors}
    content = whitened(embeddings, whitening) if embeddings is not None else None
    version = embeddings.version if embeddings is not None else None
    return TrainingData(catalog, split, content, whitening, counts, version, data_fingerprint(catalog, split, config.data.max_prefix))


def newest_session(log: SessionLog) -> list[int | str]:
    """Returns start (Unix seconds) and session_id of the last session of a log, after which a nightly update continues."""
    return [int(log.start[-1]), log.session_ids[-1]]


def check_catalogue(embeddings: Embeddings, catalog: Catalog, run: Path) -> None:
    """Checks that the embeddings are of this catalogue. Raises `UserError` (4)."""
    manifest, skipped = embeddings.version.manifest, set(embeddings.version.manifest.get("skipped", []))
    if manifest.get("catalogue_sha256") != catalog.sha256 or embeddings.item_ids != [i for i in catalog.item_ids if i not in skipped]:
        where = f"{run / 'embeddings'}, {catalog.path}"
        raise UserError(f"embeddings are of another catalogue ({where}); run `tpad export-embeddings`", ARTIFACT)


def whitened(embeddings: Embeddings, whitening: dict[str, Whitening]) -> np.ndarray:
    """Returns the whitened vectors (N, 2K), or (N, K) of embeddings with one half."""
    return np.concatenate([whitening[half](vectors) for half, vectors in embeddings.vectors.items()], axis=1)


def without_skipped(catalog: Catalog, split: Split, skipped: set[str]) -> tuple[Catalog, Split]:
    """Removes the items without embeddings from the catalogue and the sessions, as they cannot be recommended."""
    place = np.cumsum([item not in skipped for item in catalog.item_ids]) - 1
    place[[catalog.row[item] for item in skipped]] = -1
    rest = catalog.only([item for item in catalog.item_ids if item not in skipped])
    try:
        return rest, Split(split.train.moved(place, training=True), split.valid.moved(place), split.test.moved(place))
    except ValueError:
        raise UserError(f"no session is left without the items skipped for their images ({catalog.path}); fix the images", DATA) from None


def data_fingerprint(catalog: Catalog, split: Split, max_prefix: int) -> str:
    """Returns a hash of the catalogue and the split sessions."""
    digest = hashlib.sha256(canonical_json([catalog.sha256, catalog.item_ids, max_prefix]))
    for log in (split.train, split.valid, split.test):
        digest.update(canonical_json(log.session_ids) + log.offsets.tobytes() + log.rows.tobytes())
        if catalog.availability is not None:  # else times have no effect
            digest.update(log.times.tobytes())
    return digest.hexdigest()


def model_fingerprint(name: str, seed: int, config: Config, inputs: TrainingData) -> str:
    """Returns a hash of everything that a trained model depends on: not the other models of the run, nor the number of seeds, nor, for a
    model of ids alone, the embeddings."""
    content = MODELS[name].content
    settings = config.sbr.model_dump(exclude={*PUBLICATION, *(() if content else ("components",))})
    embeddings = inputs.embeddings if content else None
    parts = [FORM, name, seed, settings, inputs.fingerprint, embeddings and embeddings.manifest_sha256]
    return hashlib.sha256(canonical_json(parts)).hexdigest()
