"""Trains session models on published embeddings, or on ids alone, compares them with the baselines, and publishes one.

All models have the same settings; the epoch of each is chosen on validation, and the test sessions are ranked once. The figures are those
of models trained on the training sessions alone. The published model is trained again on all sessions (`sbr.refit`), with the number of
epochs and the calibration of its held-out twin.
"""

import hashlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from pipeline.core.artifact import Version, decoding, published, stage
from pipeline.core.config import Config, SbrConfig
from pipeline.core.errors import ARTIFACT, UserError, note
from pipeline.core.files import canonical_json, read_json, remove, write_json
from pipeline.data.embeddings import published_in
from recommender.baselines.registry import BASELINES, MODELS, chosen
from recommender.metrics.evaluator import BucketMetrics, buckets_of, cases_table, collect_results, read_ceiling
from recommender.metrics.ranks import summarise_buckets
from recommender.metrics.results_table import print_results
from recommender.retrieval.index import empty_index
from recommender.retrieval.saved_model import write_model
from recommender.session_model.model import SessionModel
from recommender.session_model.windows import Windows
from recommender.training.calibration import Calibration, apply
from recommender.training.dataset import SAME_VECTORS, TrainingData, load_training_data, model_fingerprint, newest_session
from recommender.training.search import baseline_fingerprint, baseline_settings, forget, need_optuna, search, settings_for
from recommender.training.trainer import Trained, alone, gather_ranks, make_accelerator, refit_model, train_model

FINISHED = "finished.json"  # among the checkpoints: the fingerprint of what is being published
SAMPLES = 200  # test sessions stored with the model: for trials, for the report, to measure the index


@dataclass(frozen=True)
class SbrSummary:
    """The result of `train_sbr`."""

    version: Version
    made: bool  # False: the published version already has these inputs and settings
    metrics: dict[str, Any]  # content of metrics.json


def train_sbr(config: Config, run: Path, data: Path, fresh: bool = False, trials: int = 0, minutes: float | None = None) -> SbrSummary:
    """Trains the models of a run, publishes one as `run/sbr`, and prints the table of results. Raises `UserError`.

    Reads `run/embeddings`, if a model does, and the sessions of `data`. `trials`: first searches that many settings of each model, for
    at most `minutes`; the best settings of a search are used until `fresh`, which trains and searches anew."""
    if trials:
        need_optuna()
    inputs = load_training_data(config, run, data)
    names, items = chosen(config.sbr.models), len(inputs.catalog)
    to_publish = "full" if "full" in names else "ID-only"
    check_index(to_publish, config.sbr, items)  # raises its error before the training
    accelerator = make_accelerator()
    folder = run / "sbr-train"
    with alone(folder, accelerator):
        if fresh and accelerator.is_main_process:
            forget(run)
        accelerator.wait_for_everyone()
        windows = inputs.windows(config.data.max_prefix)
        if trials:
            search(config, inputs, windows[:2], accelerator, run, trials, minutes)
        settings, of_counts = settings_for(names, config, inputs, run), baseline_settings(BASELINES, config, inputs, run)
        check_index(to_publish, settings[to_publish].sbr, items)  # of a search
        fingerprint = fingerprint_of(config, settings, of_counts, inputs)
        current, finished = published(run / "sbr", "sbr"), folder / "checkpoints" / FINISHED
        if current is not None and current.manifest.get("fingerprint") == fingerprint and not fresh:
            return SbrSummary(current, False, up_to_date(current, config.sbr, finished, accelerator))
        if accelerator.is_main_process:
            remove(finished)
        buckets = buckets_of(windows[2], inputs.counts)
        results, ranks, best = train_all(settings, to_publish, inputs, windows, buckets, accelerator, folder, fresh)
        assert isinstance(best.model, SessionModel) and best.calibration is not None
        model, source = best.model, inputs
        if config.sbr.refit:
            source = load_training_data(config, run, data, everything=True)
            model = calibrated_refit(to_publish, settings[to_publish], source, accelerator, folder, fresh, best)
        if accelerator.is_main_process:
            ceiling = read_ceiling(data, config.data)
            metrics = collect_results(inputs.split, inputs.counts, windows[2], buckets, results, ceiling, inputs.available, of_counts)
            summary = best.calibration.summary() if MODELS[to_publish].content else ""
            metrics["facts"] |= {"refit": config.sbr.refit, "calibration": best.calibration._asdict() | {"told": summary}}
            cases = cases_table(windows[2], inputs.split.test, inputs.catalog.item_ids, ranks)
            write_json(finished, fingerprint)
            version = publish(run, settings[to_publish], source, model, metrics, cases, fingerprint, best)
            remove(folder / "checkpoints")
            print_results(metrics)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            version = published(run / "sbr", "sbr") or _missing(run)
            metrics = read_json(version.path / "metrics.json")
        return SbrSummary(version, True, metrics)


def fingerprint_of(config: Config, settings: dict[str, Config], of_counts: dict[str, dict[str, float]], inputs: TrainingData) -> str:
    """Hashes what decides the figures and the published model: data, and the settings of the models and of searched baselines."""
    seeds = range(config.seed, config.seed + config.sbr.seeds)
    prints = [model_fingerprint(name, seed, settings[name], inputs) for name in settings for seed in seeds]
    prints += [baseline_fingerprint(name, drawn, inputs) for name, drawn in of_counts.items() if drawn]
    return hashlib.sha256(canonical_json([prints, refit_of(config)])).hexdigest()


def up_to_date(version: Version, settings: SbrConfig, finished: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Prints the results of a version that already has these inputs and settings, and returns them."""
    with decoding(version.path, "run `tpad train-sbr --fresh`"):
        metrics: dict[str, Any] = read_json(version.path / "metrics.json")
        if accelerator.is_main_process:
            with suppress(OSError, ValueError):
                if read_json(finished) == version.manifest["fingerprint"]:  # killed before it removed its checkpoints
                    remove(finished.parent)
            print_results(metrics)
            print_notes(version, settings)
    return metrics


def train_all(
    settings: dict[str, Config],
    to_publish: str,
    inputs: TrainingData,
    windows: tuple[Windows, Windows, Windows],
    buckets: dict[str, np.ndarray],
    accelerator: Accelerator,
    folder: Path,
    fresh: bool,
) -> tuple[dict[str, list[BucketMetrics]], dict[str, np.ndarray], Trained]:
    """Trains every model with every seed, and ranks the test cases once.

    Returns the metrics by model, a list over the seeds; the ranks (cases,) with the first seed; the model `to_publish` with that seed."""
    results: dict[str, list[BucketMetrics]] = {}
    ranks: dict[str, np.ndarray] = {}
    best: Trained | None = None
    for name, config in settings.items():
        for seed in range(config.seed, config.seed + config.sbr.seeds):
            trained = train_model(name, seed, config, inputs, windows[:2], accelerator, folder, fresh)
            test_ranks = gather_ranks(trained.model, windows[2], accelerator, inputs.available)
            ranks.setdefault(name, test_ranks)
            results.setdefault(name, []).append(summarise_buckets(test_ranks, buckets))
            if name == to_publish and best is None:
                best = trained
    assert best is not None
    return results, ranks, best


def calibrated_refit(
    name: str, config: Config, inputs: TrainingData, accelerator: Accelerator, folder: Path, fresh: bool, held_out: Trained
) -> SessionModel:
    """Trains the model to publish on all sessions (`inputs`), with the epochs and the calibration of its held-out twin."""
    model = refit_model(name, config.seed, config, inputs, accelerator, folder, fresh, held_out.epochs)
    assert isinstance(model, SessionModel) and held_out.calibration is not None
    apply(model, held_out.calibration)
    return model


def print_notes(version: Version, settings: SbrConfig) -> None:
    """Prints which settings of an up-to-date version only `tpad index` can change."""
    if (built := version.manifest["index"]["setting"]) != settings.index:
        note(f"note: its index is still {built}; run `tpad index` for sbr.index {settings.index}")
    if (shift := version.manifest["settings"]["new_items"]) != settings.new_items:
        note(f"note: its new_items is still {shift}; run `tpad index` for sbr.new_items {settings.new_items}")


def refit_of(config: Config) -> list[bool]:
    """Returns the settings that change the published model, but not the figures."""
    return [config.sbr.refit, config.distill.refit]


def check_index(name: str, settings: SbrConfig, items: int) -> None:
    """Checks that the index can be built over the vectors of a model's channels (see `build_indexes`). Raises `UserError`."""
    for more in (1, 2) if MODELS[name].content else (1,):
        empty_index(settings.index, items, settings.dim + more)


def _missing(run: Path) -> Version:
    raise UserError(f"session model was not published ({run / 'sbr'}); see the main process", ARTIFACT)


def publish(
    run: Path,
    config: Config,
    inputs: TrainingData,
    model: SessionModel,
    metrics: dict[str, Any],
    ranks: pa.Table,
    fingerprint: str,
    held_out: Trained,
) -> Version:
    """Publishes a model as a version of `run/sbr`.

    `config` and `inputs`: its settings and training data. `fingerprint`: of all models of the run. `metrics` and `ranks`: those of its twin
    `held_out`, which was not trained on the test sessions."""
    reads = model.config.content_dim > 0  # False: only other models of the run read the embeddings
    embeddings, whitening = (inputs.embeddings, inputs.whitening) if reads else (None, {})
    calibration = held_out.calibration or Calibration()
    manifest = {
        "fingerprint": fingerprint,
        "embeddings_manifest_sha256": embeddings and embeddings.manifest_sha256,
        "embeddings_version": embeddings and embeddings.name,
        "embeddings_run": published_in(config) if config.sbr.refit else ".",
        "vectors": embeddings and {key: embeddings.manifest.get(key) for key in SAME_VECTORS},
        "catalogue_sha256": inputs.catalog.sha256,
        "skipped": inputs.embeddings.manifest.get("skipped", []) if inputs.embeddings else [],
        "sessions_sha256": inputs.split.train.ids_sha256(),
        "newest_session": newest_session(inputs.split.train),
        "figures_of": "the held-out twin, trained without validation and test sessions" if config.sbr.refit else "this model",
        "refit": {"epochs": held_out.epochs, "calibration": calibration._asdict()} if config.sbr.refit else None,
        "settings": config.sbr.model_dump() | {"seed": config.seed},
        "model": asdict(model.config),
    }
    test = inputs.split.test
    samples = [[inputs.catalog.item_ids[row] for row in test.session(i)[-config.data.max_prefix :]] for i in range(min(len(test), SAMPLES))]
    with stage(run / "sbr", "sbr") as staging:
        manifest["index"] = write_model(staging.path, model, inputs.catalog, inputs.counts, samples, whitening, config.sbr.index)
        (staging.path / "metrics.json").write_bytes(canonical_json(metrics))
        pq.write_table(ranks, staging.path / "ranks.parquet", write_page_checksum=True)
        return staging.publish(manifest)
