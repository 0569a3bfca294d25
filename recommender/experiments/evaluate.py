"""`tpad evaluate`: every model under one protocol, with seeds, and the tables that tell what its figures are worth.

Each model is trained with each seed, its epoch chosen on validation, and the test ranked once. What that gave is kept in
`run/evaluation-train/<protocol>`, so that a run that was killed goes on and a model more costs its own time alone; the end is
a version of `run/evaluation/<protocol>`: report.md, metrics.json and the rank of every case in ranks.parquet.

The protocols are those of `pipeline.data.split`, and `paper-max`: the split by time, but of every metric the maximum over the epochs
on the test, as much published code reports it. It is there to compare with such figures, and only under that name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from recommender.baselines.registry import BASELINES, MODELS, Model
from recommender.metrics.evaluator import (
    TOP,
    Metrics,
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
from recommender.metrics.results_table import ROWS, Figure, Row, table, told
from recommender.metrics.significance import paired_bootstraps
from recommender.session_model.windows import PAD, Windows, prefixes_of
from recommender.training.dataset import Inputs, load_inputs, model_fingerprint
from recommender.training.search import settings_for, with_settings
from recommender.training.trainer import alone, train_model

PAPER_MAX = "paper-max"
PROTOCOLS = ("time", "user-hash", "last-out", PAPER_MAX)
CONTROL_CASES = 20_000  # at most, that are ranked again with their prefixes shuffled
ORDERS = ("as it was", "shuffled", "shuffled but the last item")
MAIN = ("HR@5", "HR@10", "HR@20", "MRR@20", "NDCG@20")
TESTED = ("HR@20", "MRR@20")  # against the reference


class Found(NamedTuple):
    """What the test says of one model with one seed."""

    ranks: np.ndarray  # (cases,)
    shuffled: np.ndarray  # (2, control cases) ranks after shuffled prefixes
    recommended: np.ndarray  # (N,) in how many cases an item is among the first 20


class Test:
    """The cases, what kind each is of, and those that are ranked again."""

    def __init__(self, inputs: Inputs, max_prefix: int) -> None:
        self.windows = inputs.windows(max_prefix)[2]
        self.log, self.available = inputs.split.test, inputs.available
        self.session, self.position = positions_of(self.windows, self.log)
        trained, group = duplicates(self.log, inputs.split.train)
        self.cluster = group[self.session]  # (cases,) sessions with the same items are one
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
    """Which cases have a prefix that both shuffles can change, of three items or more (a fixed draw of many), and these cases
    with the whole prefix shuffled and with all of it but the last item; by length, so that little is padded."""
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
    for kept in (0, 1):
        key = np.where(place < (length - kept)[:, None], rng.random(prefixes.shape), 1 + place)  # what stays keeps its place
        of_target = None if times is None else np.broadcast_to(times, prefixes.shape)
        orders.append(Windows(np.take_along_axis(prefixes, key.argsort(1), 1), only_last, line, of_target))
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
    """The models `names` (None: all that can be evaluated), `config.sbr.seeds` times each; returns the published version, its
    report, and what was left out, or nothing."""
    settings = config.data.model_copy(update={"protocol": "time" if protocol == PAPER_MAX else protocol})
    config = config.model_copy(update={"data": settings})
    inputs, neural, left_out = open_inputs(config, run, data, names)
    plain = [name for name in BASELINES if names is None or name in names]
    seeds = range(config.seed, config.seed + config.sbr.seeds)
    if protocol == PAPER_MAX and against is not None:
        raise UserError(f"nothing is held against another under {PAPER_MAX} (--against {against}); leave it out", USAGE)
    reference = None if protocol == PAPER_MAX else chosen_reference(against, [*plain, *neural])
    own = settings_for(neural, config, inputs, run)
    if protocol == PAPER_MAX:  # its maximum is over all epochs
        own = {name: with_settings(each, {"patience": each.sbr.epochs}) for name, each in own.items()}
    prints = [inputs.fingerprint, *(model_fingerprint(name, seed, own[name], inputs) for name in neural for seed in seeds)]
    whole = hashlib.sha256(canonical_json([protocol, plain, prints, reference])).hexdigest()
    target = run / "evaluation" / protocol
    current = published(target, "evaluation")
    if current is not None and current.manifest["fingerprint"] == whole and not fresh:
        return current, (current.path / "report.md").read_text(encoding="utf-8"), left_out
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("tpad evaluate runs in one process (accelerate launch); start it alone", USAGE)
    work = run / "evaluation-train" / protocol
    test = Test(inputs, config.data.max_prefix)
    ranks: dict[str, list[Found]] = {}
    results: dict[str, list[Metrics]] = {}
    with alone(work, accelerator):
        for path in list(work.iterdir()) if fresh else []:
            if path.name != LOCK:
                remove(path)
        for name in plain:
            scorer = BASELINES[name](inputs.split.train.rows, inputs.split.train.offsets, len(inputs.counts))
            found = found_baseline(scorer, test, Checkpoints(work / "found" / name, inputs.fingerprint, keep=1))
            ranks[name], results[name] = [found], [summarise_buckets(found.ranks, test.buckets)]
        for name in neural:
            for seed in seeds:
                try:
                    if protocol == PAPER_MAX:
                        results.setdefault(name, []).append(best_on_test(name, seed, own[name], inputs, test, accelerator, work))
                    else:
                        ranks.setdefault(name, []).append(found_model(name, seed, own[name], inputs, test, accelerator, work))
                        results.setdefault(name, []).append(summarise_buckets(ranks[name][-1].ranks, test.buckets))
                except NotANumber:
                    raise UserError(f"scores hold NaN ({name}, seed {seed}); lower sbr.lr and evaluate again with --fresh", USAGE) from None
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
        "spread": {name: spread_of(found) for name, found in ranks.items() if protocol != PAPER_MAX},
    }
    with stage(target, "evaluation") as staging:
        (staging.path / "report.md").write_text(report, encoding="utf-8")
        (staging.path / "metrics.json").write_bytes(canonical_json(metrics))
        if protocol != PAPER_MAX:
            columns = {  # of a baseline one, of a trained model one a seed: "full-0"
                name if name in BASELINES else f"{name}-{seed}": each.ranks
                for name, found in ranks.items()
                for seed, each in zip(seeds, found, strict=False)
            }
            cases = cases_table(test.windows, test.log, inputs.catalog.item_ids, columns)
            pq.write_table(cases, staging.path / "ranks.parquet", write_page_checksum=True)
        version = staging.publish({"fingerprint": whole, "protocol": protocol})
    return version, report, left_out


def open_inputs(config: Config, run: Path, data: Path, names: Sequence[str] | None) -> tuple[Inputs, list[str], str]:
    """What is evaluated on, which trained models are, and why not the others. Vectors of another split are refused to models
    that were asked for; where none were, those that need none go on alone."""

    def load(models: list[str]) -> Inputs:
        return load_inputs(config.model_copy(update={"sbr": config.sbr.model_copy(update={"models": models})}), run, data)

    neural = [name for name in MODELS if names is None or name in names]
    by_id = [name for name in neural if not MODELS[name].content]
    try:
        return load(neural), neural, ""
    except UserError as error:
        if names is not None:
            if error.code != ARTIFACT or by_id == neural:  # it has nothing to do with vectors
                raise
            raise UserError(f"{error}; `--models {','.join(by_id or ['ID-only'])}` needs no vectors", ARTIFACT) from None
        return load(by_id), by_id, f"models that read the exported vectors: {error}"


def chosen_models(text: str) -> list[str]:
    """The names of a list with commas, in the order of the tables."""
    asked = [part for word in text.split(",") if (part := word.strip())]
    for name in asked:
        if name not in BASELINES and name not in MODELS:
            raise UserError(f"no model `{name}` (--models); known: {', '.join([*BASELINES, *MODELS])}", USAGE)
    if not asked:
        raise UserError(f"no model (--models {text!r}); known: {', '.join([*BASELINES, *MODELS])}", USAGE)
    return [name for name in ROWS if name in asked]


def chosen_reference(against: str | None, names: list[str]) -> str | None:
    if against is not None and against not in names:
        raise UserError(f"no `{against}` among the models (--against); there are {', '.join(names)}", USAGE)
    return against or next((name for name in ("full", "ID-only") if name in names), None)


# --- what the test says


def kept(store: Checkpoints) -> Found | None:
    """What was found before; None where it was of other settings or data."""
    try:
        found = store.newest()
    except UserError:
        return None
    return None if found is None else Found(*(found[1][key].numpy() for key in Found._fields))


def keep(store: Checkpoints, found: Found) -> Found:
    store.save(1, {key: torch.as_tensor(value) for key, value in found._asdict().items()}, {})
    return found


def found_baseline(score: Scorer, test: Test, store: Checkpoints) -> Found:
    if (before := kept(store)) is not None:
        return before
    recommended = np.zeros(test.facts["items"], np.int64)
    ranks = baseline_ranks(score, test.windows, recommended, test.available)
    shuffled = np.stack([baseline_ranks(score, order, available=test.available) for order in test.orders])
    return keep(store, Found(ranks, shuffled, recommended))


def found_model(name: str, seed: int, config: Config, inputs: Inputs, test: Test, accelerator: Accelerator, work: Path) -> Found:
    store = Checkpoints(work / "found" / f"{name}-{seed}", model_fingerprint(name, seed, config, inputs), keep=1)
    if (before := kept(store)) is not None:
        return before
    windows = inputs.windows(config.data.max_prefix)[:2]
    model = train_model(name, seed, config, inputs, windows, accelerator, work, fresh=False).model
    recommended = np.zeros(test.facts["items"], np.int64)
    ranks = model_ranks(model, test.windows, recommended, test.available)
    shuffled = np.stack([model_ranks(model, order, available=test.available) for order in test.orders])
    found = keep(store, Found(ranks, shuffled, recommended))
    remove(work / "checkpoints" / f"{name}-{seed}")
    return found


def best_on_test(name: str, seed: int, config: Config, inputs: Inputs, test: Test, accelerator: Accelerator, work: Path) -> Metrics:
    """paper-max: of each metric of each bucket the largest over the epochs."""
    path, fingerprint = work / "found" / f"{name}-{seed}.json", model_fingerprint(name, seed, config, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    epochs: dict[str, Any] = {}
    try:
        before = json.loads(path.read_bytes())
        epochs = before["epochs"] if before["fingerprint"] == fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        pass

    def look(epoch: int, model: Model) -> None:
        epochs[str(epoch)] = summarise_buckets(model_ranks(model, test.windows, available=test.available), test.buckets)
        write_json(path, {"fingerprint": fingerprint, "epochs": epochs})

    if not epochs:
        remove(work / "checkpoints" / f"{name}-{seed}")  # of epochs nobody looked at
    if len(epochs) < config.sbr.epochs:
        train_model(name, seed, config, inputs, inputs.windows(config.data.max_prefix)[:2], accelerator, work, False, each_epoch=look)
    remove(work / "checkpoints" / f"{name}-{seed}")
    every = list(epochs.values())
    return {bucket: {metric: max(of[bucket][metric] for of in every) for metric in every[0][bucket]} for bucket in every[0]}


# --- tables


def row_of(runs: Sequence[Metrics]) -> Row:
    """Figures by bucket and metric, "warm HR@20"; those of all cases without a bucket's name. A run without cases of a bucket has none."""
    return {
        metric if bucket == "all" else f"{bucket} {metric}": Figure([run[bucket][metric] for run in runs if metric in run[bucket]])
        for bucket in runs[0]
        for metric in dict.fromkeys(metric for run in runs for metric in run[bucket])
        if metric != "cases"
    }


def compare(rows: dict[str, Row], ranks: Mapping[str, Sequence[Found]], reference: str, cluster: np.ndarray) -> None:
    """Puts the difference of each model to the reference beside its figures."""
    values = {
        (name, metric): np.mean([case_values(found.ranks, metric) for found in ranks[name]], axis=0) for name in rows for metric in TESTED
    }
    pairs = [(name, metric) for name, metric in values if name != reference]
    if pairs:
        differences = np.stack([values[pair] - values[reference, pair[1]] for pair in pairs])
        for (name, metric), difference in zip(pairs, paired_bootstraps(differences, cluster), strict=True):
            rows[name][metric] = rows[name][metric]._replace(against=difference)


def spread_of(found: Sequence[Found]) -> dict[str, float]:
    """Of the recommendations: how much of the catalogue they reach, and how unevenly; means over the seeds."""
    return {
        f"coverage@{TOP}": float(np.mean([(each.recommended > 0).mean() for each in found])),
        f"Gini@{TOP}": float(np.mean([gini(each.recommended) for each in found])),
    }


def markdown(
    protocol: str,
    test: Test,
    inputs: Inputs,
    rows: Mapping[str, Row],
    ranks: Mapping[str, Sequence[Found]],
    seeds: int,
    reference: str | None,
    left_out: str,
) -> str:
    mark = " (paper-max: maximum over the epochs on the test)" if protocol == PAPER_MAX else ""
    lines = [f"# Evaluation, protocol {protocol}", "", *said(protocol, test.facts, test.log)]
    if left_out:
        lines += ["", f"Left out: {left_out}."]
    over = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    lines += ["", f"## All cases{mark}", "", f"All items ranked; ties at their mean rank. {over} of the trained models.", ""]
    lines += table(rows, {metric: metric for metric in MAIN})
    if reference is not None:
        lines += ["", f"## Differences to {reference}", "", "With 95 % interval and two-sided p, not corrected for how many there are:"]
        lines += ["paired bootstrap, in which test sessions with the same items are drawn together.", ""]
        lines += table({name: row for name, row in rows.items() if name != reference}, {m: m for m in TESTED}, lambda f: told(f.against))
    lines += ["", f"## Distinct test sessions{mark}", "", "Each once, and none that is in training.", ""]
    lines += table(rows, {f"distinct {metric}": metric for metric in MAIN})
    sizes = {name: int(mask.sum()) for name, mask in test.buckets.items() if name != "distinct" and mask.any()}
    for metric in TESTED:
        lines += ["", f"## {metric} by kind of case{mark}", "", "With the number of cases; head, middle and tail have a third of the"]
        lines += ["training events each.", "", *table(rows, {f"{name} {metric}": f"{name} ({size})" for name, size in sizes.items()})]
    if protocol != PAPER_MAX:
        lines += ["", "## Does order matter?", "", f"MRR@20 of {len(test.control)} cases with three items or more before the target.", ""]
        lines += table({name: order_of(found, test.control) for name, found in ranks.items()}, {order: order for order in ORDERS})
        lines += ["", f"## What is recommended, first {TOP}", "", f"Gini of the training events: {gini(inputs.counts):.4f}.", ""]
        spread = {name: {key: Figure([value]) for key, value in spread_of(found).items()} for name, found in ranks.items()}
        lines += table(spread, {f"coverage@{TOP}": "share of the catalogue", f"Gini@{TOP}": "Gini"})
    return "\n".join(lines) + "\n"


def order_of(found: Sequence[Found], control: np.ndarray) -> Row:
    if not len(control):
        return {}
    every = [(each.ranks[control], *each.shuffled) for each in found]
    return {order: Figure([float(case_values(of[n], "MRR@20").mean()) for of in every]) for n, order in enumerate(ORDERS)}


def said(protocol: str, facts: Mapping[str, Any], log: SessionLog) -> list[str]:
    """What of the data whoever reads the tables should know."""
    older = facts["test_sessions_older_than_newest_training"] / len(log)
    lines = [
        f"- {facts['items']} items, {facts['cold_items']} of them in no training session; {facts['unseen_targets']} of "
        f"{facts['test_cases']} test cases have such a target, and count",
        f"- sessions: {facts['train_sessions']} training, {facts['valid_sessions']} validation, {facts['test_sessions']} test; "
        f"{facts['one_event_sessions_dropped']} of one event left out",
        f"- duplicates: {facts['test_sessions_also_in_training']} test sessions are also in training, {facts['test_sessions_repeated']} "
        f"repeat an earlier test session; {facts['distinct_test_sessions']} are left without both",
        f"- {older:.1%} of the test sessions began before the newest training session"
        + ("" if older == 0 else ": a leak, as models know what came later"),
    ]
    if protocol == "user-hash":
        lines.append(f"- split by a hash of the {'user_id' if facts['split_by_user'] else 'session_id, as the data has no user_id'}")
    if protocol == "last-out":
        lines.append("- one case a session, its last item; what came before it was trained on")
    if protocol == PAPER_MAX:
        lines.append("- every figure of a trained model is its maximum over the epochs ON THE TEST: higher than what the model does on new")
        lines.append("  sessions. Do not set it beside figures of another protocol")
    return lines
