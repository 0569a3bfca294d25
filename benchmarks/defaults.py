"""Do the defaults of `sbr.*` hold on every log? One setting at a time is changed, over windows of time of several logs.

    python benchmarks/defaults.py --log shop=artifacts/shop/data --log diginetica=data/diginetica --work artifacts/defaults \
        --out benchmarks/results/defaults.json

The newest tenth of each log is left out, so that nothing is chosen on it, and of the rest the newest `--sessions` are taken. The model
is ID-only, which every log allows; `--run NAME=RUN` gives the embeddings of a log, for the settings of the content channel. A figure
is that of a change less that of the defaults, the mean over the windows. Resumable: what a window has found is kept in `--work`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from newest_tenth import write_part

from pipeline.core.config_file import load_config
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import load_sessions
from pipeline.run_folder import remember
from recommender.experiments.rolling import evaluate_windows

METRICS = ("HR@20", "MRR@20")
CHANGES = {
    "ID-only": (
        *("sbr.lr=0.001", "sbr.lr=0.006", "sbr.batch=64", "sbr.batch=512", "sbr.epochs=3", "sbr.dim=128", "sbr.own_loss=1.0"),
        *("sbr.parts.companions=0", "sbr.parts.graph=false", "sbr.parts.attention=false", "sbr.select=HR@20"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", action="append", required=True, metavar="NAME=DATA")
    parser.add_argument("--sessions", type=int, default=12_000)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--changes", help="of the settings, those whose text has one of these words: a,b")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="a setting of all runs, as of tpad")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for name, _, folder in (text.partition("=") for text in options.log):
        data = Path(folder)
        log = load_sessions(data, load_catalog(data))
        end = len(log) - len(log) // 10
        part = options.work / name / "data"
        if not part.exists():
            write_part(data, part, log, np.arange(max(0, end - options.sessions), end))
        words = (options.changes or "").split(",")
        base: dict[str, float] = {}
        for change in ("", *(each for each in CHANGES["ID-only"] if any(word in each for word in words))):
            run = options.work / name / (change.replace("=", "-") or "defaults")
            config = load_config(None, ["sbr.models=[ID-only]", *options.set, *([change] if change else [])])
            remember(run, part, config)
            version, _, _ = evaluate_windows(config, run, part, options.windows, ["ID-only"], None)
            found = json.loads((version.path / "metrics.json").read_bytes())["results"]["ID-only"]["mean"]["all"]
            base = base or found
            label = change.removeprefix("sbr.") or "defaults"
            for metric in METRICS:
                rows.setdefault(label, {})[f"{name} {metric}"] = found[metric] - (base[metric] if change else 0.0)
            print(json.dumps({"log": name, "change": label} | {metric: found[metric] for metric in METRICS}), flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
