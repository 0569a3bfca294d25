"""Evaluates the models under one protocol with several seeds, and writes the tables: `tpad evaluate`.

Each model is trained with each seed, its epoch chosen on validation, and the test ranked once. The results are stored in
`run/evaluation-train/<protocol>`, so that a killed evaluation resumes and an added model costs only its own time. Published is
a version of `run/evaluation/<protocol>`: report.md, metrics.json and the rank of every case in ranks.parquet.

The protocols are those of `pipeline.data.split`, and `paper-max`: the split by time with, of every metric, the maximum over the epochs
on the test, as much published code reports it. Use it only to compare with such figures.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from pipeline.core.artifact import LOCK, Version, published, stage
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.core.files import canonical_json, remove, write_json
from pipeline.data.session_log import SessionLog
from recommender.baselines.counts import Scorer
from recommender.baselines.registry import BASELINES, MODELS, Model, build_baseline
from recommender.metrics.evaluator import (
    TOP,
    BucketMetrics,
    average,
    baseline_ranks,
    buckets_of,
    cases_table,
    duplicates,
    facts_of,
    model_ranks,
    positions_of,
)
from recommender.metrics.ranks import NotANumber, case_values, gini, summarise_buckets
from recommender.metrics.results_table import ROWS, Figure, Row, format_difference, table
from recommender.metrics.significance import paired_bootstraps
from recommender.session_model.windows import PAD, Windows, prefixes_of
from recommender.training.dataset import TrainingData, load_training_data, model_fingerprint
from recommender.training.search import settings_for, with_settings
from recommender.training.trainer import alone, train_model

PAPER_MAX = "paper-max"
PROTOCOLS = ("time", "user-hash", "cold-items", "last-out", PAPER_MAX)
CONTROL_CASES = 20_000  # maximum number of cases that are ranked again with shuffled prefixes
ORDERS = ("original", "shuffled", "shuffled but the last item")
MAIN = ("HR@5", "HR@10", "HR@20", "MRR@20", "NDCG@20")
TESTED = ("HR@20", "MRR@20")  # against the reference


class SeedResult(NamedTuple):
    """The test results of one model with one seed."""

    ranks: np.ndarray  # (cases,)
    shuffled: np.ndarray  # (2, control cases) ranks with shuffled prefixes
    recommended: np.ndarray  # (N,) number of cases in which an item is among the first 20


class EvaluationCases:
    """Holds the test cases, their buckets, and the cases that are ranked again with shuffled prefixes."""

    def __init__(self, inputs: TrainingData, max_prefix: int) -> None:
        self.windows = inputs.windows(max_prefix)[2]
        self.log, self.available = inputs.split.test, inputs.available
        self.session, self.position = positions_of(self.windows, self.log)
        trained, group = duplicates(self.log, inputs.split.train)
        self.cluster = group[self.session]  # (cases,) number of the session; sessions with the same items share one
        distinct = ~trained & (group == np.arange(len(group)))
        self.buckets = buckets_of(self.windows, inputs.counts) | {"distinct": distinct[self.session]}
        self.control, self.orders = shuffled_prefixes(self.windows)
        self.facts = facts_of(inputs.split, inputs.counts, trained, group) | {
            "test_cases": len(self.session),
            "distinct_test_sessions": int(distinct.sum()),
            "unseen_targets": int(self.buckets["cold"].sum()),
            "test_sessions_older_than_newest_training": int((self.log.start < inputs.split.train.start.max()).sum()),
            "split_by_user": bool(self.log.users),
        }


def shuffled_prefixes(windows: Windows) -> tuple[np.ndarray, list[Windows]]:
    """Returns the cases (C,) with a prefix of three items or more, which both shuffles can change, and these cases with shuffled prefixes.

    The first shuffle is of all items of a prefix, the second of all but the last. At most `CONTROL_CASES` cases, a fixed random sample,
    are taken; they are sorted by length, so that little is padded."""
    prefixes, targets = prefixes_of(windows)
    length = (prefixes != PAD).sum(1)
    rng = np.random.default_rng(0)
    chosen = np.flatnonzero(length >= 3)
    if len(chosen) > CONTROL_CASES:
        chosen = np.sort(rng.choice(chosen, CONTROL_CASES, replace=False))
    chosen = chosen[np.argsort(length[chosen], kind="stable")]
    times = None if windows.times is None else windows.times[windows.targets != PAD][chosen, None]
    prefixes, length, line = prefixes[chosen], length[chosen], np.arange(len(chosen))
    only_last = np.full_like(prefixes, PAD)
    only_last[line, length - 1] = targets[chosen]
    place, orders = np.arange(prefixes.shape[1]), []
    for fixed in (0, 1):  # number of last items that are not shuffled
        key = np.where(place < (length - fixed)[:, None], rng.random(prefixes.shape), 1 + place)
        target_times = None if times is None else np.broadcast_to(times, prefixes.shape)
        orders.append(Windows(np.take_along_axis(prefixes, key.argsort(1), 1), only_last, line, target_times))
    return chosen, orders


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
    data_settings = config.data.model_copy(update={"protocol": "time" if protocol == PAPER_MAX else protocol})
    config = config.model_copy(update={"data": data_settings})
    inputs, neural, left_out = open_inputs(config, run, data, names)
    baselines = [name for name in BASELINES if names is None or name in names]
    if protocol == PAPER_MAX and against is not None:
        raise UserError(f"{PAPER_MAX} compares no models (--against {against}); omit it", USAGE)
    reference = None if protocol == PAPER_MAX else chosen_reference(against, [*baselines, *neural])
    seeds = range(config.seed, config.seed + config.sbr.seeds)
    settings = settings_for(neural, config, inputs, run)
    if protocol == PAPER_MAX:  # its maximum is over all epochs
        settings = {name: with_settings(model, {"patience": model.sbr.epochs}) for name, model in settings.items()}
    prints = [inputs.fingerprint, *(model_fingerprint(name, seed, settings[name], inputs) for name in neural for seed in seeds)]
    fingerprint = hashlib.sha256(canonical_json([protocol, baselines, prints, reference])).hexdigest()
    target = run / "evaluation" / protocol
    current = published(target, "evaluation")
    if current is not None and current.manifest["fingerprint"] == fingerprint and not fresh:
        return current, (current.path / "report.md").read_text(encoding="utf-8"), left_out
    accelerator, work = single_process(), run / "evaluation-train" / protocol
    test = EvaluationCases(inputs, config.data.max_prefix)
    with alone(work, accelerator):
        if fresh:
            clear(work)
        results, ranks = rank_baselines(baselines, inputs, test, work)
        for name in neural:
            if protocol == PAPER_MAX:
                results[name] = [best_on_test(name, seed, settings[name], inputs, test, accelerator, work) for seed in seeds]
            else:
                ranks[name] = [rank_model(name, seed, settings[name], inputs, test, accelerator, work) for seed in seeds]
                results[name] = [summarise_buckets(result.ranks, test.buckets) for result in ranks[name]]
    rows = {name: row_of(runs) for name, runs in sorted(results.items(), key=lambda entry: ROWS.index(entry[0]))}
    if reference is not None:
        compare(rows, ranks, reference, test.cluster)
    report = markdown(protocol, test, inputs, rows, ranks, len(seeds), reference, left_out)
    metrics = {
        "protocol": protocol,
        "facts": test.facts,
        "seeds": list(seeds),
        "against": reference,
        "left_out": left_out,
        "results": {name: dict(zip(("mean", "std"), average(runs), strict=True)) | {"seeds": len(runs)} for name, runs in results.items()},
        "differences": {name: {m: f.against._asdict() for m, f in row.items() if f.against is not None} for name, row in rows.items()},
        "spread": {name: recommended_spread(by_seed) for name, by_seed in ranks.items() if protocol != PAPER_MAX},
    }
    cases = None if protocol == PAPER_MAX else ranks_table(test, inputs, ranks, seeds)
    return publish(target, report, metrics, cases, {"fingerprint": fingerprint, "protocol": protocol}), report, left_out


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


def rank_baselines(
    names: Sequence[str], inputs: TrainingData, test: EvaluationCases, work: Path
) -> tuple[dict[str, list[BucketMetrics]], dict[str, list[SeedResult]]]:
    """Returns the metrics and the ranks of the baselines, by name."""
    ranks: dict[str, list[SeedResult]] = {}
    for name in names:
        scorer = build_baseline(name, inputs.split.train, len(inputs.counts))
        ranks[name] = [rank_baseline(scorer, test, Checkpoints(work / "found" / name, inputs.fingerprint, keep=1))]
    return {name: [summarise_buckets(by_seed[0].ranks, test.buckets)] for name, by_seed in ranks.items()}, ranks


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
    """Returns the result of an earlier call; None without one, or for one of other settings or data."""
    try:
        checkpoint = store.newest()
    except UserError:
        return None
    return None if checkpoint is None else SeedResult(*(checkpoint[1][key].numpy() for key in SeedResult._fields))


def store_result(store: Checkpoints, result: SeedResult) -> SeedResult:
    """Stores a result for a later call, and returns it."""
    store.save(1, {key: torch.as_tensor(value) for key, value in result._asdict().items()}, {})
    return result


def rank_baseline(score: Scorer, test: EvaluationCases, store: Checkpoints) -> SeedResult:
    """Ranks the test cases by a baseline, or returns the stored result."""
    if (stored := stored_result(store)) is not None:
        return stored
    recommended = np.zeros(test.facts["items"], np.int64)
    ranks = baseline_ranks(score, test.windows, recommended, test.available)
    shuffled = np.stack([baseline_ranks(score, order, available=test.available) for order in test.orders])
    return store_result(store, SeedResult(ranks, shuffled, recommended))


def rank_model(
    name: str, seed: int, config: Config, inputs: TrainingData, test: EvaluationCases, accelerator: Accelerator, work: Path
) -> SeedResult:
    """Trains a model and ranks the test cases by it, or returns the stored result. Raises `UserError` for scores that are NaN."""
    store = Checkpoints(work / "found" / f"{name}-{seed}", model_fingerprint(name, seed, config, inputs), keep=1)
    if (stored := stored_result(store)) is not None:
        return stored
    windows = inputs.windows(config.data.max_prefix)[:2]
    with nan_is_an_error(name, seed):
        model = train_model(name, seed, config, inputs, windows, accelerator, work, fresh=False).model
        recommended = np.zeros(test.facts["items"], np.int64)
        ranks = model_ranks(model, test.windows, recommended, test.available)
        shuffled = np.stack([model_ranks(model, order, available=test.available) for order in test.orders])
    result = store_result(store, SeedResult(ranks, shuffled, recommended))
    remove(work / "checkpoints" / f"{name}-{seed}")
    return result


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
    try:
        stored = json.loads(path.read_bytes())
        epochs = stored["epochs"] if stored["fingerprint"] == fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        pass

    def test_epoch(epoch: int, model: Model) -> None:
        epochs[str(epoch)] = summarise_buckets(model_ranks(model, test.windows, available=test.available), test.buckets)
        write_json(path, {"fingerprint": fingerprint, "epochs": epochs})

    if not epochs:
        remove(work / "checkpoints" / f"{name}-{seed}")  # its epochs were not tested
    if len(epochs) < config.sbr.epochs:
        windows = inputs.windows(config.data.max_prefix)[:2]
        with nan_is_an_error(name, seed):
            train_model(name, seed, config, inputs, windows, accelerator, work, False, each_epoch=test_epoch)
    remove(work / "checkpoints" / f"{name}-{seed}")
    results = list(epochs.values())
    return {bucket: {metric: max(epoch[bucket][metric] for epoch in results) for metric in results[0][bucket]} for bucket in results[0]}


# --- tables


def row_of(runs: Sequence[BucketMetrics]) -> Row:
    """Returns the figures of a model by bucket and metric ("warm HR@20"; without a bucket: all cases), one value for each run.

    A run without cases of a bucket has no value there."""
    return {
        metric if bucket == "all" else f"{bucket} {metric}": Figure([run[bucket][metric] for run in runs if metric in run[bucket]])
        for bucket in runs[0]
        for metric in dict.fromkeys(metric for run in runs for metric in run[bucket])
        if metric != "cases"
    }


def compare(rows: dict[str, Row], ranks: Mapping[str, Sequence[SeedResult]], reference: str, cluster: np.ndarray) -> None:
    """Adds to the figures of each model their difference to the reference model, for the metrics `TESTED`."""
    values = {
        (name, metric): np.mean([case_values(result.ranks, metric) for result in ranks[name]], axis=0) for name in rows for metric in TESTED
    }
    pairs = [(name, metric) for name, metric in values if name != reference]
    if pairs:
        differences = np.stack([values[pair] - values[reference, pair[1]] for pair in pairs])
        for (name, metric), difference in zip(pairs, paired_bootstraps(differences, cluster), strict=True):
            rows[name][metric] = rows[name][metric]._replace(against=difference)


def recommended_spread(results: Sequence[SeedResult]) -> dict[str, float]:
    """Returns coverage (share of the catalogue that is recommended) and Gini of the recommendations; means over the seeds."""
    return {
        f"coverage@{TOP}": float(np.mean([(result.recommended > 0).mean() for result in results])),
        f"Gini@{TOP}": float(np.mean([gini(result.recommended) for result in results])),
    }


def markdown(
    protocol: str,
    test: EvaluationCases,
    inputs: TrainingData,
    rows: Mapping[str, Row],
    ranks: Mapping[str, Sequence[SeedResult]],
    seeds: int,
    reference: str | None,
    left_out: str,
) -> str:
    """Returns the report."""
    mark = " (paper-max: maximum over the epochs on the test)" if protocol == PAPER_MAX else ""
    lines = [f"# Evaluation, protocol {protocol}", "", *data_notes(protocol, test.facts, test.log)]
    if left_out:
        lines += ["", f"Left out: {left_out}."]
    over = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    lines += ["", f"## All cases{mark}", "", f"All items ranked; ties at their mean rank. {over} of the trained models.", ""]
    lines += table(rows, {metric: metric for metric in MAIN})
    if reference is not None:
        lines += ["", f"## Differences to {reference}", "", "With 95 % interval and two-sided p, not corrected for how many there are:"]
        lines += ["paired bootstrap, in which test sessions with the same items are drawn together.", ""]
        lines += table(
            {name: row for name, row in rows.items() if name != reference}, {m: m for m in TESTED}, lambda f: format_difference(f.against)
        )
    lines += ["", f"## Distinct test sessions{mark}", "", "Each once, and none that is in training.", ""]
    lines += table(rows, {f"distinct {metric}": metric for metric in MAIN})
    sizes = {name: int(mask.sum()) for name, mask in test.buckets.items() if name != "distinct" and mask.any()}
    for metric in TESTED:
        lines += ["", f"## {metric} by kind of case{mark}", "", "With the number of cases; head, middle and tail have a third of the"]
        lines += ["training events each.", "", *table(rows, {f"{name} {metric}": f"{name} ({size})" for name, size in sizes.items()})]
    if protocol != PAPER_MAX:
        lines += ["", "## Does order matter?", "", f"MRR@20 of {len(test.control)} cases with three items or more before the target.", ""]
        lines += table({name: shuffled_row(results, test.control) for name, results in ranks.items()}, {order: order for order in ORDERS})
        lines += ["", f"## Recommended items, first {TOP}", "", f"Gini of the training events: {gini(inputs.counts):.4f}.", ""]
        spread = {name: {key: Figure([value]) for key, value in recommended_spread(results).items()} for name, results in ranks.items()}
        lines += table(spread, {f"coverage@{TOP}": "share of the catalogue", f"Gini@{TOP}": "Gini"})
    return "\n".join(lines) + "\n"


def shuffled_row(results: Sequence[SeedResult], control: np.ndarray) -> Row:
    """Returns MRR@20 of the `control` cases with each of `ORDERS`; empty without such cases."""
    if not len(control):
        return {}
    ranks = [(result.ranks[control], *result.shuffled) for result in results]
    return {order: Figure([float(case_values(by_order[n], "MRR@20").mean()) for by_order in ranks]) for n, order in enumerate(ORDERS)}


def data_notes(protocol: str, facts: Mapping[str, Any], log: SessionLog) -> list[str]:
    """Returns the notes on the data above the tables: cold items, duplicates, leaks of the split."""
    older = facts["test_sessions_older_than_newest_training"] / len(log)
    lines = [
        f"- {facts['items']} items, {facts['cold_items']} of them in no training session; {facts['unseen_targets']} of "
        f"{facts['test_cases']} test cases have such a target, and count",
        f"- sessions: {facts['train_sessions']} training, {facts['valid_sessions']} validation, {facts['test_sessions']} test; "
        f"{facts['one_event_sessions_dropped']} of one event left out",
        f"- duplicates: {facts['test_sessions_also_in_training']} test sessions are also in training, {facts['test_sessions_repeated']} "
        f"repeat an earlier test session; {facts['distinct_test_sessions']} are left without both",
        f"- {older:.1%} of the test sessions began before the newest training session"
        + ("" if older == 0 else ": a leak, as models have seen later sessions"),
    ]
    if protocol == "user-hash":
        lines.append(f"- split by a hash of the {'user_id' if facts['split_by_user'] else 'session_id, as the data has no user_id'}")
    if protocol == "last-out":
        lines.append("- one case for each session, its last item; the items before it are in training")
    if protocol == PAPER_MAX:
        lines.append("- every figure of a trained model is its maximum over the epochs ON THE TEST: higher than on new sessions.")
        lines.append("  Do not compare it with figures of another protocol")
    return lines
