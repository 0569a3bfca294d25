"""Updates the published session model with the sessions that are new since its training, for nightly runs: `tpad train-sbr --update`.

The model is extended to the current items (as by `tpad index`), the new sessions are added to its counts, and its weights are trained
for a short time on the new sessions and on the newest old ones, which prevents forgetting (experience replay). Its calibration stays.
The newest tenth of the new sessions is held back: the result is published only if it ranks them no worse than the published model. The
next update trains on them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.artifact import Version
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.core.files import canonical_json, remove
from pipeline.data.session_log import SessionLog, load_sessions
from recommender.metrics.evaluator import model_ranks
from recommender.metrics.ranks import case_values
from recommender.session_model.windows import cases_of, training_windows
from recommender.training.dataset import newest_session
from recommender.training.rebuild_index import Current, open_current
from recommender.training.trainer import Training, alone, fit, make_accelerator

LEAST_SESSIONS = 10  # new sessions: of fewer, a tenth is less than one session
REPLAY = 4  # old sessions in the training for each new one
EPOCHS, RATE = 2, 0.3  # of the short training; factor of the learning rate


@dataclass(frozen=True)
class Updated:
    """The result of `update_sbr`."""

    version: Version  # the published version
    sessions: int  # new sessions that were trained on
    told: str  # one line for the user


def update_sbr(config: Config, run: Path, data: Path) -> Updated:
    """Publishes the updated model as `run/sbr`, unless it is worse or there is too little to learn. Resumable. Raises `UserError`."""
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise UserError("--update runs in one process (accelerate launch); start it alone", USAGE)
    folder = run / "sbr-train"
    with alone(folder, accelerator):
        current = open_current(run, data)
        before = current.before
        if before.manifest.get("refit") is None:
            raise UserError(
                f"the published model was not trained on all sessions ({run}); train it with sbr.refit=true to update it", ARTIFACT
            )
        log = sessions_of(current, data)
        new = sessions_after(log, *before.manifest["newest_session"])
        if len(new) < LEAST_SESSIONS:
            return Updated(before, 0, f"{len(new)} new sessions, fewer than {LEAST_SESSIONS}: nothing to learn yet")
        held_back = len(new) // 10
        learned, checked = log.select(new[:-held_back]), log.select(new[-held_back:])
        replayed = np.arange(max(0, int(new[0]) - REPLAY * len(learned)), new[0])  # sessions are in order of time
        published, counts = current.model(), current.counts + np.bincount(learned.rows, minlength=len(current.rows))
        model = published.learning(learned.rows, learned.offsets, counts, config.seed)
        settings = config.sbr.model_copy(update={"epochs": EPOCHS, "lr": RATE * config.sbr.lr, "patience": EPOCHS})
        train, limits = log.select(np.concatenate([replayed, new[:-held_back]])), current.catalog.availability
        parts = [before.manifest["fingerprint"], current.source, train.ids_sha256(), settings.model_dump(), config.seed]
        fingerprint = hashlib.sha256(canonical_json(parts)).hexdigest()
        prefix = model.config.max_prefix
        windows = training_windows(train, prefix, limits is not None)
        checkpoints = Checkpoints(folder / "checkpoints" / "update", fingerprint)
        training = Training("update", config.seed, model, settings, windows, counts, limits, accelerator, folder, checkpoints)
        fit(training, EPOCHS)
        cases = cases_of(checked, prefix, limits is not None)
        after, earlier = (case_values(model_ranks(ranker, cases, available=limits), config.sbr.select) for ranker in (model, published))
        gain, error = float((after - earlier).mean()), float((after - earlier).std()) / len(after) ** 0.5
        summary = f"{config.sbr.select} on the newest {len(checked)} sessions: {after.mean():.4f}, published model {earlier.mean():.4f}"
        if gain < -error:
            remove(checkpoints.folder)
            return Updated(before, 0, f"not published, as the update is worse: {summary}; run `tpad train-sbr` to train anew")
        facts = {
            "fingerprint": fingerprint,
            "sessions_sha256": hashlib.sha256((before.manifest["sessions_sha256"] + learned.ids_sha256()).encode()).hexdigest(),
            "newest_session": newest_session(learned),
            "updates": before.manifest.get("updates", 0) + 1,
        }
        version = current.publish(run, model, counts, config.sbr.index, facts)
        remove(checkpoints.folder)
        return Updated(version, len(learned), summary)


def sessions_after(log: SessionLog, start: int, session_id: str) -> np.ndarray:
    """Returns the numbers of the sessions after (`start`, `session_id`); start is in Unix seconds. The log is in that order."""
    same = np.flatnonzero(log.start == start)
    return np.concatenate([[n for n in same if log.session_ids[n] > session_id], np.flatnonzero(log.start > start)]).astype(np.int64)


def sessions_of(current: Current, data: Path) -> SessionLog:
    """Reads the sessions of a data folder, in rows of the items that can be recommended."""
    catalog, item_ids = current.data_catalog, current.catalog.item_ids
    log = load_sessions(data, catalog)
    place = np.full(len(catalog), -1)
    place[[catalog.row[item] for item in item_ids]] = np.arange(len(item_ids))
    return log if np.array_equal(place, np.arange(len(catalog))) else log.moved(place, training=True)
