"""Evaluates the models under one protocol with several seeds, and writes the tables: `tpad evaluate`.

Each model is trained with each seed, its epoch chosen on validation, and the test ranked once. The results are stored in
`run/evaluation-train/<protocol>`, so that a killed evaluation resumes and an added model costs only its own time. Published is
a version of `run/evaluation/<protocol>`: report.md, metrics.json and the rank of every case in ranks.parquet.

The protocols are those of `pipeline.data.split`, and `paper-max`: the split by time with, of every metric, the maximum over the epochs
on the test, as much published code reports it. Use it only to compare with such figures.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from pipeline.core.artifact import LOCK, Version, decoding, published, stage
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.core.files import canonical_json, read_sealed, remove, write_sealed
from recommender.baselines.registry import BASELINES, MODELS, Model, build_baseline
from recommender.experiments.evaluation_cases import EvaluationCases, SeedResult
from recommender.experiments.evaluation_report import PAPER_MAX, compare, markdown, recommended_spread, row_of, speed
from recommender.metrics.evaluator import BucketMetrics, average, baseline_ranks, cases_table, model_ranks
from recommender.metrics.ranks import NotANumber, summarise_buckets
from recommender.metrics.results_table import ROWS
from recommender.training.dataset import TrainingData, load_training_data, model_fingerprint
from recommender.training.search import baseline_fingerprint, baseline_settings, budget, settings_for, with_settings
from recommender.training.trainer import alone, train_model

PROTOCOLS = ("time", "user-hash", "cold-items", "last-out", PAPER_MAX)


def evaluate(
    config: Config,
    run: Path,
    data: Path,
    protocol: str,
    names: Sequence[str] | None = None,
    against: str | None = None,
    fresh: bool = False,
) -> tuple[Version, str, str]:
    """Evaluates the models `names` (None: all that can be evaluated), each with `config.sbr.seeds` seeds.

    Returns the published version, its report, and which models were left out and why (empty: none). `against`: the model that the others
    are compared with (None: full, else ID-only). `fresh`: evaluates again. Raises `UserError`."""
    plan = make_plan(config, run, data, protocol, names, against)
    target = run / "evaluation" / protocol
    current = published(target, "evaluation")
    if current is not None and current.manifest.get("fingerprint") == plan.fingerprint and not fresh:
        with decoding(current.path, "run `tpad evaluate --fresh`"):
            return current, (current.path / "report.md").read_text(encoding="utf-8"), plan.left_out
    test = EvaluationCases(plan.inputs, config.data.max_prefix)
    results, ranks = rank_all(plan, test, run / "evaluation-train" / protocol, fresh)
    rows = {name: row_of(runs) for name, runs in sorted(results.items(), key=lambda entry: ROWS.index(entry[0]))}
    if plan.reference is not None:
        compare(rows, ranks, plan.reference, test.cluster)
    searched = budget([*plan.baselines, *plan.models], plan.config, plan.inputs, run)
    report = markdown(protocol, test, plan.inputs, rows, ranks, len(plan.seeds), plan.reference, plan.left_out, searched)
    metrics = {
        "protocol": protocol,
        "facts": test.facts,
        "seeds": list(plan.seeds),
        "against": plan.reference,
        "left_out": plan.left_out,
        "search": searched,
        "results": {name: dict(zip(("mean", "std"), average(runs), strict=True)) | {"seeds": len(runs)} for name, runs in results.items()},
        "differences": {name: {m: f.against._asdict() for m, f in row.items() if f.against is not None} for name, row in rows.items()},
        "spread": {name: recommended_spread(by_seed) for name, by_seed in ranks.items() if protocol != PAPER_MAX},
        "speed": {name: speed(by_seed, test) for name, by_seed in ranks.items()},
    }
    cases = None if protocol == PAPER_MAX else ranks_table(test, plan.inputs, ranks, plan.seeds)
    return publish(target, report, metrics, cases, {"fingerprint": plan.fingerprint, "protocol": protocol}), report, plan.left_out


class Plan(NamedTuple):
    """What an evaluation evaluates, and with which settings."""

    protocol: str
    config: Config
    inputs: TrainingData
    left_out: str  # which models, and why; empty: none
    reference: str | None  # the model that the others are compared with
    seeds: range
    baselines: dict[str, dict[str, float]]  # settings by name
    models: dict[str, Config]  # the same of the trained models
    fingerprint: str


def make_plan(config: Config, run: Path, data: Path, protocol: str, names: Sequence[str] | None, against: str | None) -> Plan:
    """Decides what is evaluated; the parameters are those of `evaluate`. Raises `UserError`."""
    data_settings = config.data.model_copy(update={"protocol": "time" if protocol == PAPER_MAX else protocol})
    config = config.model_copy(update={"data": data_settings})
    inputs, neural, left_out = open_inputs(config, run, data, names)
    baselines = [name for name in BASELINES if names is None or name in names]
    if protocol == PAPER_MAX and against is not None:
        raise UserError(f"{PAPER_MAX} compares no models (--against {against}); omit it", USAGE)
    reference = None if protocol == PAPER_MAX else chosen_reference(against, [*baselines, *neural])
    seeds = range(config.seed, config.seed + config.sbr.seeds)
    models, of_counts = settings_for(neural, config, inputs, run), baseline_settings(baselines, config, inputs, run)
    if protocol == PAPER_MAX:  # its maximum is over all epochs
        models = {name: with_settings(model, {"patience": model.sbr.epochs}) for name, model in models.items()}
    prints = [inputs.fingerprint, *(model_fingerprint(name, seed, models[name], inputs) for name in neural for seed in seeds)]
    prints += [baseline_fingerprint(name, of_counts[name], inputs) for name in baselines]
    fingerprint = hashlib.sha256(canonical_json([protocol, prints, reference])).hexdigest()
    return Plan(protocol, config, inputs, left_out, reference, seeds, of_counts, models, fingerprint)


def rank_all(
    plan: Plan, test: EvaluationCases, work: Path, fresh: bool
) -> tuple[dict[str, list[BucketMetrics]], dict[str, list[SeedResult]]]:
    """Ranks the test cases by every model with every seed. Returns metrics and ranks by model; paper-max has no ranks of trained ones."""
    accelerator = single_process()
    with alone(work, accelerator):
        if fresh:
            clear(work)
        # paper-max has the baselines of time
        stored = work.with_name(plan.config.data.protocol)
        ranks = {name: [rank_baseline(name, drawn, plan.inputs, test, stored)] for name, drawn in plan.baselines.items()}
        results = {name: [summarise_buckets(by_seed[0].ranks, test.buckets)] for name, by_seed in ranks.items()}
        for name, config in plan.models.items():
            if plan.protocol == PAPER_MAX:
                results[name] = [best_on_test(name, seed, config, plan.inputs, test, accelerator, work) for seed in plan.seeds]
            else:
                ranks[name] = [rank_model(name, seed, config, plan.inputs, test, accelerator, work) for seed in plan.seeds]
                results[name] = [summarise_buckets(result.ranks, test.buckets) for result in ranks[name]]
    return results, ranks


def single_process() -> Accelerator:
    """Returns the accelerator. Raises `UserError` (2) under `accelerate launch` with several processes."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("tpad evaluate runs in one process (accelerate launch); start it alone", USAGE)
    return accelerator


def clear(work: Path) -> None:
    """Deletes the stored results and checkpoints in a locked folder, but not its lock."""
    for path in list(work.iterdir()):
        if path.name != LOCK:
            remove(path)


def ranks_table(test: EvaluationCases, inputs: TrainingData, ranks: Mapping[str, Sequence[SeedResult]], seeds: Sequence[int]) -> pa.Table:
    """Returns every case with its ranks: one column for a baseline, one for each seed of a trained model ("full-0")."""
    columns = {
        name if name in BASELINES else f"{name}-{seed}": result.ranks
        for name, by_seed in ranks.items()
        for seed, result in zip(seeds, by_seed, strict=False)
    }
    return cases_table(test.windows, test.log, inputs.catalog.item_ids, columns)


def publish(target: Path, report: str, metrics: dict[str, Any], cases: pa.Table | None, manifest: dict[str, Any]) -> Version:
    """Publishes a version of an evaluation: report.md, metrics.json and, with `cases`, ranks.parquet."""
    with stage(target, "evaluation") as staging:
        (staging.path / "report.md").write_text(report, encoding="utf-8")
        (staging.path / "metrics.json").write_bytes(canonical_json(metrics))
        if cases is not None:
            pq.write_table(cases, staging.path / "ranks.parquet", write_page_checksum=True)
        return staging.publish(manifest)


def open_inputs(config: Config, run: Path, data: Path, names: Sequence[str] | None) -> tuple[TrainingData, list[str], str]:
    """Returns the data, the names of the trained models to evaluate, and why the others are left out (empty: none is).

    If the vectors are unusable, for example of another split, models that were named explicitly raise the `UserError`; without `names`,
    the models that read no vectors are evaluated alone."""

    def load(models: list[str]) -> TrainingData:
        return load_training_data(config.model_copy(update={"sbr": config.sbr.model_copy(update={"models": models})}), run, data)

    neural = [name for name in MODELS if names is None or name in names]
    by_id = [name for name in neural if not MODELS[name].content]
    try:
        return load(neural), neural, ""
    except UserError as error:
        if names is not None:
            if error.code != ARTIFACT or by_id == neural:  # the error is not about vectors
                raise
            raise UserError(f"{error}; `--models {','.join(by_id or ['ID-only'])}` needs no vectors", ARTIFACT) from None
        return load(by_id), by_id, f"models that read the exported vectors: {error}"


def chosen_models(text: str) -> list[str]:
    """Parses a comma-separated list of model names; returns them in the order of the tables. Raises `UserError` (2)."""
    names = [part for word in text.split(",") if (part := word.strip())]
    for name in names:
        if name not in BASELINES and name not in MODELS:
            raise UserError(f"no model `{name}` (--models); known: {', '.join([*BASELINES, *MODELS])}", USAGE)
    if not names:
        raise UserError(f"no model (--models {text!r}); known: {', '.join([*BASELINES, *MODELS])}", USAGE)
    return [name for name in ROWS if name in names]


def chosen_reference(against: str | None, names: list[str]) -> str | None:
    """Returns the model that the others are compared with; None: there is none. Raises `UserError` (2) if `against` is not evaluated."""
    if against is not None and against not in names:
        raise UserError(f"no `{against}` among the models (--against); there are {', '.join(names)}", USAGE)
    return against or next((name for name in ("full", "ID-only") if name in names), None)


# --- ranks


def stored_result(store: Checkpoints) -> SeedResult | None:
    """Returns the result of an earlier call; None without one, for one of other settings or data, and for one that cannot be used."""
    with suppress(UserError, KeyError):
        if (checkpoint := store.newest()) is not None:
            return SeedResult(*(checkpoint[1][key].numpy() for key in SeedResult._fields))
    return None


def store_result(store: Checkpoints, result: SeedResult) -> SeedResult:
    """Stores a result for a later call, and returns it."""
    store.save(1, {key: torch.as_tensor(value) for key, value in result._asdict().items()}, {})
    return result


def rank_baseline(name: str, settings: Mapping[str, float], inputs: TrainingData, test: EvaluationCases, work: Path) -> SeedResult:
    """Ranks the test cases by a baseline, or returns the stored result."""
    store = Checkpoints(work / "found" / name, baseline_fingerprint(name, settings, inputs), keep=1)
    if (stored := stored_result(store)) is not None:
        return stored
    began = time.monotonic()
    score = build_baseline(name, inputs.split.train, len(inputs.counts), settings)
    built = time.monotonic() - began
    return store_result(store, ranked(partial(baseline_ranks, score), test, built))


def rank_model(
    name: str, seed: int, config: Config, inputs: TrainingData, test: EvaluationCases, accelerator: Accelerator, work: Path
) -> SeedResult:
    """Trains a model and ranks the test cases by it, or returns the stored result. Raises `UserError` for scores that are NaN."""
    store = Checkpoints(work / "found" / f"{name}-{seed}", model_fingerprint(name, seed, config, inputs), keep=1)
    if (stored := stored_result(store)) is not None:
        return stored
    windows = inputs.windows(config.data.max_prefix)[:2]
    with nan_is_an_error(name, seed):
        trained = train_model(name, seed, config, inputs, windows, accelerator, work, fresh=False)
        result = store_result(store, ranked(partial(model_ranks, trained.model), test, trained.seconds))
    remove(work / "checkpoints" / f"{name}-{seed}")
    return result


def ranked(ranks_of: Callable[..., np.ndarray], test: EvaluationCases, training_seconds: float) -> SeedResult:
    """Ranks the test cases, also with shuffled prefixes: `ranks_of` is `model_ranks` of a model, or `baseline_ranks` of a scorer."""
    recommended, began = np.zeros(test.facts["items"], np.int64), time.monotonic()
    ranks = ranks_of(test.windows, recommended, test.available)
    seconds = np.array([training_seconds, time.monotonic() - began])
    return SeedResult(ranks, np.stack([ranks_of(order, available=test.available) for order in test.orders]), recommended, seconds)


@contextmanager
def nan_is_an_error(name: str, seed: int) -> Iterator[None]:
    """Turns `NotANumber` into an error message for the user."""
    try:
        yield
    except NotANumber:
        raise UserError(f"scores hold NaN ({name}, seed {seed}); lower sbr.lr and evaluate again with --fresh", USAGE) from None


def best_on_test(
    name: str, seed: int, config: Config, inputs: TrainingData, test: EvaluationCases, accelerator: Accelerator, work: Path
) -> BucketMetrics:
    """Returns, for paper-max, the maximum over the epochs of every metric of every bucket on the test."""
    path, fingerprint = work / "found" / f"{name}-{seed}.json", model_fingerprint(name, seed, config, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    epochs: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = read_sealed(path)
        epochs = dict(stored["epochs"]) if stored["fingerprint"] == fingerprint else {}

    def test_epoch(epoch: int, model: Model) -> None:
        epochs[str(epoch)] = summarise_buckets(model_ranks(model, test.windows, available=test.available), test.buckets)
        write_sealed(path, {"fingerprint": fingerprint, "epochs": epochs})

    if not epochs:
        remove(work / "checkpoints" / f"{name}-{seed}")  # its epochs were not tested
    if len(epochs) < config.sbr.epochs:
        windows = inputs.windows(config.data.max_prefix)[:2]
        with nan_is_an_error(name, seed):
            train_model(name, seed, config, inputs, windows, accelerator, work, False, each_epoch=test_epoch)
    remove(work / "checkpoints" / f"{name}-{seed}")
    results = list(epochs.values())
    return {bucket: {metric: max(epoch[bucket][metric] for epoch in results) for metric in results[0][bucket]} for bucket in results[0]}
