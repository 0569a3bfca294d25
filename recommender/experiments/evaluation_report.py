"""Makes the report of an evaluation: its tables and notes, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.data.session_log import SessionLog
from recommender.experiments.evaluation_cases import EvaluationCases, SeedResult
from recommender.metrics.evaluator import TOP, BucketMetrics
from recommender.metrics.ranks import case_values, gini
from recommender.metrics.results_table import Figure, Row, format_difference, table
from recommender.metrics.significance import paired_bootstraps
from recommender.training.dataset import TrainingData

PAPER_MAX = "paper-max"
ORDERS = ("original", "shuffled", "shuffled but the last item")
MAIN = ("HR@5", "HR@10", "HR@20", "MRR@20", "NDCG@20")
TESTED = ("HR@20", "MRR@20")  # against the reference


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
    searched: Mapping[str, Mapping[str, Any]],
) -> str:
    """Returns the report. `searched`: result of `budget`."""
    mark = " (paper-max: maximum over the epochs on the test)" if protocol == PAPER_MAX else ""
    lines = [f"# Evaluation, protocol {protocol}", "", *data_notes(protocol, test.facts, test.log)]
    if left_out:
        lines += ["", f"Left out: {left_out}."]
    lines += ["", search_note(searched, rows)]
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
        lines += ["", "## Speed", "", "On this machine. Training includes validation; ranking is of all items, with the first 20.", ""]
        lines += ["| | training, s | test sessions ranked a second |", "| --- | ---: | ---: |"]
        speeds = {name: speed(results, test) for name, results in ranks.items()}
        lines += [f"| {name} | {of['training seconds']:,.1f} | {of['sessions a second']:,.0f} |" for name, of in speeds.items()]
    return "\n".join(lines) + "\n"


def search_note(searched: Mapping[str, Mapping[str, Any]], names: Mapping[str, Any]) -> str:
    """Tells what the settings of the models are from."""
    if not searched:
        return "Every model has the settings of the config, and the baselines of counts their defaults: none was searched for."
    trials = sorted({int(entry["trials"]) for entry in searched.values()})
    limits = sorted({entry["minutes"] for entry in searched.values() if entry.get("minutes")})
    limit = f", at most {' or '.join(f'{minutes:g}' for minutes in limits)} minutes for each" if limits else ""
    note = f"Searched on validation, {' or '.join(map(str, trials))} settings tried for each{limit}: {', '.join(searched)}."
    others = [name for name in names if name not in searched]
    return f"{note} Not searched: {', '.join(others)}." if others else note


def speed(results: Sequence[SeedResult], test: EvaluationCases) -> dict[str, float]:
    """Returns the seconds of a training and the test sessions ranked a second; means over the seeds."""
    training, ranking = np.mean([result.seconds for result in results], axis=0)
    return {"training seconds": float(training), "sessions a second": test.facts["test_sessions"] / max(float(ranking), 1e-9)}


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
