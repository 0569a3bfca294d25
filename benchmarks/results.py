"""Keeps the figures of a run as JSON, and makes the tables of docs/results.md and README.md from them.

    python benchmarks/results.py keep shop artifacts/shop/evaluation/time/v0001/metrics.json --section "Sample shop" \
        --title "All models" --command "tpad evaluate --seeds 3"
    python benchmarks/results.py page

`keep` reads the metrics.json of `tpad evaluate` or `tpad train-sbr`, the ablation.csv of `tpad ablate`, or a flat JSON or CSV of a
benchmark, and writes benchmarks/results/NAME.json: the rows, and which commit, command, seeds and machine they are from. `page`
fills every pair of markers

    <!-- table: NAME, ... | columns: HR@20, ... | rows: full, ... -->   <!-- end -->

and adds what docs/results.md has no marker for. No figure of those tables is typed by hand; tests/test_results.py holds them to the JSON.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results"
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"
SECTIONS = ("Sample shop", "MovieLens", "Diginetica", "Tmall", "Complete Journey", "Training", "Export", "GPU", "Index", "Serving")
COLUMNS = ("HR@10", "HR@20", "MRR@10", "MRR@20", "warm HR@20", "cold HR@20", "training, s", "sessions/s")  # of a table of models
BUCKETS, CUTOFFS = ("all", "warm", "cold", "repeat", "novel"), ("@10", "@20")  # that are kept
CODE = ("cli.py", "configs", "pipeline", "recommender", ":(glob)benchmarks/*.py")  # what figures depend on
MARKER = re.compile(r"<!-- table: (?P<names>[^|\n]*?)(?P<options>\|[^\n]*?)? -->\n(?P<content>.*?)<!-- end -->", re.DOTALL)
Cell = float | int | str | dict[str, float]  # a dict: {mean, std}, or {difference, low, high, p}
Row = dict[str, Cell]


# --- figures to JSON


def keep(args: argparse.Namespace) -> None:
    path = KEPT / f"{args.name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    texts = {key: getattr(args, key) or before.get(key, "") for key in ("section", "title", "note")}
    if not texts["section"] or not texts["title"]:
        sys.exit(f"error: {args.name} is new (command line); give --section and --title")
    facts, seeds, rows = read(args.file)
    entry = {
        **({"name": args.name} | texts),
        "commit": commit_of(args.file, args.commit),
        "date": datetime.fromtimestamp(args.file.stat().st_mtime).date().isoformat(),
        "machine": args.machine or machine(),
        "command": " ".join(args.command.split()),
        "seeds": args.seeds if args.seeds is not None else seeds,
        "facts": facts,
        "rows": rows,
    }
    KEPT.mkdir(exist_ok=True)
    path.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(rows)} rows of commit {entry['commit'][:7]}; next: python benchmarks/results.py page")


def read(path: Path) -> tuple[dict[str, Any], list[int], list[Row]]:
    """(facts about the data, seeds, rows) of a file that a command or a benchmark has written."""
    if path.suffix == ".csv":
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        if lines and {"variant", "metric", "mean"} <= lines[0].keys():
            return {}, list(range(int(lines[0]["seeds"]))), rows_of_ablation(lines)
        return {}, [], [{key: number(value) for key, value in line.items()} for line in lines]
    found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, dict) and "results" in found:
        seeds = found.get("seeds") or list(range(max(of.get("seeds", 1) for of in found["results"].values())))
        return facts_of(found), seeds, rows_of_models(found)
    if isinstance(found, dict) and "rows" in found:
        found = found["rows"]
    if isinstance(found, dict):
        nested = all(isinstance(value, dict) for value in found.values())
        found = [{"": key} | (value if nested else {"value": value}) for key, value in found.items()]
    return {}, [], [{key: rounded(value) for key, value in row.items() if not isinstance(value, list | dict)} for row in found]


def facts_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a table names, from the metrics of `tpad evaluate` or `tpad train-sbr`."""
    facts = {key: found["facts"][key] for key in ("items", "cold_items", "train_sessions", "test_sessions") if key in found["facts"]}
    first = next(iter(found["results"].values()))["mean"]
    if (searched := found.get("search")) is not None:
        budgets = {(entry["trials"], entry["minutes"]) for entry in searched.values()}
        told = [
            f"{trials} trials" + (f" in at most {minutes:g} minutes" if minutes else "") for trials, minutes in sorted(budgets, key=str)
        ]
        facts["search"] = f"search of {' or '.join(told)}: {', '.join(searched)}" if searched else "no search of settings"
    return facts | {f"{bucket} cases": int(first[bucket]["cases"]) for bucket in ("all", "cold") if "cases" in first.get(bucket, {})}


def rows_of_models(found: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, result in found["results"].items():
        row: Row = {"model": name}
        for bucket in (bucket for bucket in BUCKETS if bucket in result["mean"]):
            for metric, value in result["mean"][bucket].items():
                if metric.endswith(CUTOFFS):
                    spread = result.get("std", {}).get(bucket, {}).get(metric) if result.get("seeds", 1) > 1 else None
                    column = metric if bucket == "all" else f"{bucket} {metric}"
                    row[column] = rounded(value) if spread is None else {"mean": rounded(value), "std": rounded(spread)}
        if speed := found.get("speed", {}).get(name):
            row |= {"training, s": rounded(speed["training seconds"]), "sessions/s": rounded(speed["sessions a second"])}
        for metric, difference in found.get("differences", {}).get(name, {}).items():
            row[f"{metric} less that of {found['against']}"] = {
                "difference" if key == "mean" else key: rounded(value) for key, value in difference.items()
            }
        rows.append(row)
    return rows


def rows_of_ablation(lines: Iterable[Mapping[str, str]]) -> list[Row]:
    rows: dict[str, Row] = {}
    for line in lines:
        row, mean = rows.setdefault(line["variant"], {"variant": line["variant"]}), number(line["mean"])
        row[line["metric"]] = {"mean": float(mean), "std": float(number(line["std"]))} if line["std"] else mean
        if line["difference"]:
            row[f"{line['metric']} less that of full"] = {key: float(number(line[key])) for key in ("difference", "low", "high", "p")}
    return list(rows.values())


def number(text: str) -> Cell:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return rounded(float(text))
    except ValueError:
        return text


def rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def commit_of(file: Path, named: str | None) -> str:
    """The commit that the figures are from: the one named, or HEAD, if nothing says that it is another."""
    if named is None:
        if changed := git("status", "--porcelain", "--untracked-files=no", "--", *CODE):
            sys.exit(
                f"error: the code differs from its commit ({changed.splitlines()[0].strip()}); commit it, or name the commit (--commit)"
            )
        if file.stat().st_mtime < int(git("show", "-s", "--format=%ct", "HEAD")):
            sys.exit(f"error: {file} is older than this commit; name the commit that it is from (--commit)")
    return git("rev-parse", "--verify", f"{named or 'HEAD'}^{{commit}}")


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: git {words[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "unknown processor"
    return f"{' '.join(model.split())}, {os.cpu_count()} cores"


# --- JSON to tables


def entries() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))}


def rendered(text: str, found: Mapping[str, Mapping[str, Any]], complete: bool) -> str:
    """`text` with every table made again. Where it must be `complete`, a table without its JSON is an error; else it is left out."""

    def block(marker: re.Match[str]) -> str:
        names = [name.strip() for name in marker["names"].split(",")]
        if complete and (missing := [name for name in names if name not in found]):
            sys.exit(f"error: no benchmarks/results/{missing[0]}.json (docs/results.md); keep it, or delete its table")
        options = {
            key.strip(): split(value) for key, _, value in (part.partition(":") for part in (marker["options"] or "")[1:].split("|"))
        }
        lines = table([found[name] for name in names if name in found], options.get("columns", []), options.get("rows", []))
        return marker[0].partition("\n")[0] + "\n" + "".join(f"{line}\n" for line in lines) + "<!-- end -->"

    return MARKER.sub(block, text)


def split(text: str) -> list[str]:
    return [part for word in text.split(",") if (part := word.strip())]


def table(kept: Sequence[Mapping[str, Any]], columns: Sequence[str], rows: Sequence[str]) -> list[str]:
    """The lines of a table of one entry, or of several side by side, each under what it is from."""
    if not kept:
        return []
    heads: list[tuple[int, str]] = []  # (which entry, which column)
    for place, entry in enumerate(kept):
        present = list(dict.fromkeys(column for row in entry["rows"] for column in list(row)[1:]))
        chosen = columns or ([column for column in present if column in COLUMNS or " less that of " in column] if of_models(entry) else [])
        heads += [(place, column) for column in chosen or present if column in present]
    cells = [{str(next(iter(row.values()))): row for row in entry["rows"]} for entry in kept]
    names = list(dict.fromkeys(name for entry in cells for name in entry))
    if of_models(kept[0]):  # the order in the file is that of the alphabet
        first = heads[0]
        names.sort(key=lambda name: value_of(cells[first[0]].get(name, {}).get(first[1], -1.0)))
    names = [name for name in rows if name in names] or names
    titles = [f"{kept[place]['section']}: {column}" if len(kept) > 1 else column for place, column in heads]
    lines = ["", *(origin(entry, named=len(kept) > 1) for entry in kept), ""]
    lines += [f"| {next(iter(kept[0]['rows'][0]))} | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(heads)]
    for name in names:
        shown = (cell(cells[place].get(name, {}).get(column, ""), column) for place, column in heads)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    notes = [entry["note"] for entry in kept if entry["note"] and len(kept) == 1]
    return [*lines, "", *(part for note in notes for part in (note, ""))]


def of_models(entry: Mapping[str, Any]) -> bool:
    return next(iter(entry["rows"][0])) in ("model", "variant")


def value_of(cell: Cell) -> float:
    return float(cell["mean"]) if isinstance(cell, dict) else cell if isinstance(cell, int | float) else -1.0


def cell(value: Cell, column: str) -> str:
    if isinstance(value, dict) and "std" in value:
        return f"{figure(value['mean'], column)} ± {figure(value['std'], column)}"
    if isinstance(value, dict):
        return f"{value['difference']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}], p {value['p']:.2g}"
    return figure(value, column) if isinstance(value, int | float) else value


def figure(value: float, column: str) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if "@" in column else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def origin(entry: Mapping[str, Any], named: bool) -> str:
    """One line: which data, commit, command, seeds and machine a table is from."""
    facts, seeds = entry["facts"], entry["seeds"]
    sizes = [f"{facts[key]:,} {what}" for key, what in (("all cases", "test cases"), ("cold cases", "of them cold")) if facts.get(key)]
    sizes += [f"{facts[key]:,} {what}" for key, what in (("items", "items"), ("train_sessions", "training sessions")) if facts.get(key)]
    drawn = ", ".join(map(str, seeds))
    parts = [
        f"commit `{entry['commit'][:7]}`",
        entry["date"],
        *([f"seed{'s' * (len(seeds) > 1)} {drawn}"] if seeds else []),
        *([facts["search"]] if facts.get("search") else []),
        entry["machine"],
    ]
    line = f"{entry['section'] + ': ' if named else ''}{'; '.join(parts)}; `{entry['command']}`."
    return f"- {line}" if named else f"{line[0].upper()}{line[1:]}" + (f" {', '.join(sizes)}." if sizes else "")


def with_new_tables(text: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/results.md with markers for what it has none for, each at the end of its section."""
    there = {name.strip() for marker in MARKER.finditer(text) for name in marker["names"].split(",")}
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    for name, entry in found.items():
        if name in there:
            continue
        added = f"### {entry['title']}\n\n<!-- table: {name} -->\n<!-- end -->\n"
        sections = [part.partition("\n")[0].removeprefix("## ") for part in parts[1:]]
        if entry["section"] in sections:
            place = 1 + sections.index(entry["section"])
            parts[place] = f"{parts[place].rstrip()}\n\n{added}\n"
        else:
            later = [n for n, section in enumerate(sections, 1) if rank(section) > rank(entry["section"])]
            parts.insert(later[0] if later else len(parts), f"## {entry['section']}\n\n{added}\n")
    return "".join(part.rstrip() + "\n\n" for part in parts).rstrip() + "\n"


def rank(section: str) -> int:
    """Where a section of tables stands; one that is no section of tables stands first."""
    return SECTIONS.index(section) if section in SECTIONS else -1


def pages() -> dict[Path, str]:
    """What docs/results.md and README.md should hold."""
    found = entries()
    results = with_new_tables(RESULTS.read_text(encoding="utf-8"), found)
    return {RESULTS: rendered(results, found, True), README: rendered(README.read_text(encoding="utf-8"), found, False)}


def page(args: argparse.Namespace) -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/results.md and README.md, and the JSON they are made from.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("keep", help="figures of a run -> benchmarks/results/NAME.json")
    command.set_defaults(run=keep)
    command.add_argument("name", help="name of the JSON and of its table")
    command.add_argument("file", type=Path, help="metrics.json, ablation.csv, or a flat JSON or CSV of a benchmark")
    command.add_argument("--command", required=True, help="the command that wrote the file")
    command.add_argument("--section", help=f"heading of docs/results.md: {', '.join(SECTIONS)}; default: as before")
    command.add_argument("--title", help="subject of the table; default: as before")
    command.add_argument("--note", help="a sentence under the table; default: as before")
    command.add_argument("--commit", help="commit that the figures are from; default: HEAD, if the code is that of HEAD")
    command.add_argument("--machine", help="default: this one")
    command.add_argument("--seeds", type=lambda text: [int(word) for word in split(text)], help="e.g. 0,1,2; default: as the file says")
    command = commands.add_parser("page", help="JSON -> the tables of docs/results.md and README.md")
    command.set_defaults(run=page)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
