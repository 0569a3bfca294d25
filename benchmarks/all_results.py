"""Makes the tables of session models in docs/results.md again: `make results`.

    python benchmarks/all_results.py                          every log whose data folder is there, every model
    python benchmarks/all_results.py --logs diginetica,tmall --models SKNN,VSTAN,ID-only --seeds 1

Each log is evaluated by `tpad evaluate` in a run of its own under --work, the counts first, then one trained model more at a time: after a
kill it goes on where it was, and what is finished is in the tables, with which models are not. Before it starts it says how long it
takes: trained models that an earlier table has take what they took there. Data folders are those of docs/results.md (data/NAME);
one that is missing is left out. --search N first searches N settings of every model, for at most --search-minutes each.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from results import KEPT, git

from recommender.baselines.registry import BASELINES, MODELS

ROOT = Path(__file__).parent.parent
NOTE = "Not evaluated here: "


class Log(NamedTuple):
    """A log of the tables."""

    section: str
    config: str | None = None  # None: the defaults
    settings: tuple[str, ...] = ()
    content: bool = False  # has texts or images, so that vectors are distilled first
    protocols: tuple[str, ...] = ("time",)


LOGS = {
    "diginetica": Log("Diginetica", "configs/clicks.yaml", ("data.test=0.07877789",), protocols=("time", "paper-max")),
    "tmall": Log("Tmall", "configs/clicks.yaml", ("data.test=0.01548716",), protocols=("time", "paper-max")),
    "complete-journey": Log("Complete Journey", "configs/clicks.yaml", ("data.test=0.1",)),
    "movielens": Log("MovieLens", "configs/movielens-posters.yaml", content=True),
    "shop": Log("Sample shop", content=True),
}
TITLES = {
    "time": "Session models and baselines, settings and epochs chosen on validation",
    "paper-max": "Best epoch on the test, as papers report it",
}


def allowed(log: Log) -> list[str]:
    """Returns the models that a log allows: without texts and images, those that read no vectors."""
    return [*BASELINES, *(name for name, recipe in MODELS.items() if log.content or not recipe.content)]


def tpad(*words: str | Path) -> None:
    """Runs a tpad command; ends with its exit code if it fails."""
    print("$ tpad", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "cli", *map(str, words)], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def evaluate(name: str, log: Log, models: Sequence[str], chosen: argparse.Namespace, data: Path) -> None:
    run = chosen.work / name
    options = ["--run", run, *(["--config", log.config] if log.config else []), *(["--data", data] if name != "shop" else [])]
    options += [part for setting in (*log.settings, *chosen.set) for part in ("--set", setting)]
    if log.content and any(model in MODELS and MODELS[model].content for model in models):
        tpad("distill", *options)
        tpad("export-embeddings", *options)
    trained = [model for model in models if model in MODELS]
    if chosen.search:
        more = ["--search", str(chosen.search), *(["--search-minutes", str(chosen.search_minutes)] if chosen.search_minutes else [])]
        named = [*trained, *(["ID-only"] if not {"full", "ID-only"} & {*trained} else [])]
        tpad("train-sbr", *options, "--set", f"sbr.models=[{', '.join(named)}]", "--set", "sbr.refit=false", *more)
    counts = [model for model in models if model in BASELINES]
    first = [model for model in ("full", "ID-only") if model in trained][:1]  # what the others are compared with
    order = [*first, *(model for model in trained if model not in first)]
    for protocol in log.protocols if order else log.protocols[:1]:  # without an epoch to choose, paper-max is the same
        for count in range(min(1, len(order)), len(order) + 1):
            among = [*counts, *order[:count]]
            seeds = ["--seeds", str(chosen.seeds)]
            tpad("evaluate", *options, "--protocol", protocol, "--models", ",".join(among), *seeds)
            keep(name, log, protocol, among, run, chosen, options)


def keep(
    name: str, log: Log, protocol: str, among: Sequence[str], run: Path, chosen: argparse.Namespace, options: Sequence[str | Path]
) -> None:
    """Writes the JSON of a table, and the tables of docs/results.md."""
    folder = run / "evaluation" / protocol
    version = json.loads((folder / "current").read_text(encoding="utf-8"))["version"]
    path = folder / version / "metrics.json"
    rest = [model for model in allowed(log) if model not in among]
    anywhere = {str(run): f"artifacts/{name}", str(chosen.data / name): f"data/{name}"}  # as docs/results.md names the folders
    command = " ".join(
        ["tpad evaluate", *(anywhere.get(str(word), str(word)) for word in options), f"--protocol {protocol} --seeds {chosen.seeds}"]
    )
    table = name if protocol == "time" else f"{name}-{protocol}"
    note = [] if not rest else ["--note", f"{NOTE}{', '.join(rest)}."]
    words = ["keep", table, path, "--command", command, "--section", log.section, "--title", TITLES[protocol], *note]
    if chosen.commit:
        words += ["--commit", chosen.commit]
    for arguments in (words, ["page"]):
        subprocess.run([sys.executable, ROOT / "benchmarks" / "results.py", *arguments], cwd=ROOT, check=True)


def expected_seconds(name: str, log: Log, models: Sequence[str], seeds: int) -> tuple[float, list[str]]:
    """Returns the seconds that the trained models of an earlier table take, with all seeds and protocols, and the names of the others."""
    path = KEPT / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    took = {row["model"]: row["training, s"] for row in rows if "training, s" in row}
    trained = [model for model in models if model in MODELS]
    known = sum(took[model] for model in trained if model in took)
    return float(known * seeds * len(log.protocols)), [model for model in trained if model not in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "results", help="runs; delete it to begin anew")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the prepared data folders")
    parser.add_argument("--logs", default=",".join(LOGS), help="of the logs above")
    parser.add_argument("--models", help="default: all that the log allows")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--search", type=int, default=0)
    parser.add_argument("--search-minutes", type=float)
    parser.add_argument("--commit", help="that the figures are from; default: HEAD, if the code is that of HEAD")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run; repeatable")
    chosen = parser.parse_args()
    names = [name for name in chosen.logs.split(",") if name]
    if unknown := [name for name in names if name not in LOGS]:
        sys.exit(f"error: no log {unknown[0]!r} (--logs); known: {', '.join(LOGS)}")
    work = []
    for name in names:
        data = chosen.data / name
        if name != "shop" and not (data / "sessions.parquet").exists():
            print(f"{name}: left out, as {data}/sessions.parquet is missing; docs/results.md says how it is made")
            continue
        models = [model for model in allowed(LOGS[name]) if not chosen.models or model in chosen.models.split(",")]
        seconds, unknown = expected_seconds(name, LOGS[name], models, chosen.seeds)
        told = f"; no time is known for {', '.join(unknown)}" if unknown else ""
        print(f"{name}: {len(models)} models, {seconds / 60:.0f} minutes of training as of the last table{told}")
        work.append((name, data, models))
    print(f"commit {git('rev-parse', '--short', 'HEAD')}; a killed run goes on with the same command", flush=True)
    for name, data, models in work:
        began = time.monotonic()
        evaluate(name, LOGS[name], models, chosen, data)
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
