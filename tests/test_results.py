"""benchmarks/results.py: the tables of docs/results.md and README.md are those of the kept JSON, and of nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results

FIELDS = {"name", "section", "title", "note", "commit", "date", "machine", "command", "seeds", "facts", "rows"}
EVALUATION = {
    "protocol": "time",
    "seeds": [0, 1],
    "against": "full",
    "facts": {"items": 1200, "cold_items": 180, "train_sessions": 10800, "test_sessions": 1350},
    "results": {
        name: {
            "mean": {bucket: {"cases": 50, "HR@5": 0.01, "HR@20": value, "MRR@20": value / 3} for bucket in ("all", "cold", "prefix 1")},
            "std": {bucket: {"cases": 0.0, "HR@5": 0.0, "HR@20": 0.0012, "MRR@20": 0.0} for bucket in ("all", "cold", "prefix 1")},
            "seeds": seeds,
        }
        for name, value, seeds in (("full", 0.4, 2), ("SKNN", 0.2, 1))
    },
    "differences": {"full": {}, "SKNN": {"HR@20": {"mean": -0.2, "low": -0.21, "high": -0.19, "p": 0.0002}}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own: one commit, a page and a README."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name, path in (("KEPT", "benchmarks/results"), ("RESULTS", "docs/results.md"), ("README", "README.md")):
        monkeypatch.setattr(results, name, tmp_path / path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs" / "results.md").write_text("# Results\n\n## The data\n\nWords.\n\n## Export\n\nOther words.\n")
    (tmp_path / "README.md").write_text("# It\n\n<!-- table: shop, films | columns: HR@20 | rows: SKNN, full -->\n<!-- end -->\n\nEnd.\n")
    (tmp_path / "cli.py").write_text("print()\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "One"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["results.py", *map(str, words)])
    results.main()


def written(place: Path, content: object, name: str = "metrics.json") -> Path:
    path = place / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, sort_keys=True))
    os.utime(path, (2e9, 2e9))  # after any commit
    return path


def test_the_pages_are_current() -> None:
    for path, text in results.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python benchmarks/results.py page`"


def test_every_table_has_its_json_and_every_json_says_where_it_is_from() -> None:
    text = results.RESULTS.read_text(encoding="utf-8")
    named = {name.strip() for marker in results.MARKER.finditer(text) for name in marker["names"].split(",")}
    assert named == results.entries().keys()
    for name, entry in results.entries().items():
        assert entry.keys() == FIELDS and entry["name"] == name and entry["rows"]
        assert re.fullmatch("[0-9a-f]{40}", entry["commit"]) and entry["command"] and entry["machine"]


@pytest.mark.parametrize("path", [results.RESULTS, results.README], ids=lambda path: path.name)
def test_no_figure_of_a_table_is_typed_by_hand(path: Path) -> None:
    rest = results.MARKER.sub("", path.read_text(encoding="utf-8"))
    assert [line for line in rest.splitlines() if line.startswith("|") and re.search(r"\d\.\d|\d %", line)] == []


def test_figures_become_json_and_json_tables(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--section", "Sample shop", "--title", "All models", "--command", "tpad evaluate  --seeds 2", "--note", "A note."]
    run(monkeypatch, "keep", "shop", written(place, EVALUATION), *words)
    entry = json.loads((place / "benchmarks" / "results" / "shop.json").read_text())
    assert entry.keys() == FIELDS and entry["seeds"] == [0, 1] and entry["command"] == "tpad evaluate --seeds 2"
    run(monkeypatch, "page")
    page = (place / "docs" / "results.md").read_text()
    assert re.findall(r"^##.*", page, re.MULTILINE) == ["## The data", "## Sample shop", "### All models", "## Export"]
    assert f"Commit `{entry['commit'][:7]}`" in page and "seeds 0, 1" in page and "50 test cases" in page and "\nA note.\n" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == "| model | HR@20 | MRR@20 | cold HR@20 | HR@20 less that of full |"
    assert rows[2].startswith("| SKNN | 0.2000 | 0.0667 | 0.2000 | -0.2000 [-0.2100, -0.1900], p 0.0002")
    assert rows[3].startswith("| full | 0.4000 ± 0.0012 | 0.1333 ± 0.0000 |")
    readme = (place / "README.md").read_text()
    assert "| SKNN | 0.2000 |\n| full | 0.4000 ± 0.0012 |" in readme and readme.endswith("<!-- end -->\n\nEnd.\n")
    run(monkeypatch, "page")
    assert page == (place / "docs" / "results.md").read_text() and readme == (place / "README.md").read_text()
    run(monkeypatch, "keep", "shop", written(place, EVALUATION), "--command", "tpad evaluate")  # section, title and note stay
    assert json.loads((place / "benchmarks" / "results" / "shop.json").read_text())["note"] == "A note."
    (place / "benchmarks" / "results" / "shop.json").unlink()
    with pytest.raises(SystemExit, match=r"no benchmarks/results/shop\.json"):
        run(monkeypatch, "page")


def test_metrics_of_train_sbr_name_no_seeds(place: Path) -> None:
    metrics = {key: EVALUATION[key] for key in ("facts", "results")}
    _, seeds, rows = results.read(written(place, metrics))
    assert seeds == [0, 1] and {row["model"] for row in rows} == {"full", "SKNN"}


def test_an_ablation_and_a_flat_file_are_read(place: Path) -> None:
    text = "variant,metric,seeds,mean,std,difference,low,high,p\nfull,HR@20,2,0.5,0.01,,,,\nmerge,HR@20,2,0.4,0.02,-0.1,-0.2,-0.05,0.01\n"
    _, seeds, rows = results.read(written(place, text, "ablation.csv"))
    assert seeds == [0, 1] and rows[0] == {"variant": "full", "HR@20": {"mean": 0.5, "std": 0.01}}
    assert rows[1]["HR@20 less that of full"] == {"difference": -0.1, "low": -0.2, "high": -0.05, "p": 0.01}
    assert results.read(written(place, {"tpad": {"items/s": 354}, "plain": {"items/s": 73}}))[2] == [
        {"": "plain", "items/s": 73},
        {"": "tpad", "items/s": 354},
    ]
    assert results.read(written(place, {"seconds": 1.5}))[2] == [{"": "seconds", "value": 1.5}]


def test_figures_of_unknown_code_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, words = written(place, EVALUATION), ["--section", "Sample shop", "--title", "All models", "--command", "tpad evaluate"]
    os.utime(path, (1e9, 1e9))
    with pytest.raises(SystemExit, match="older than this commit"):
        run(monkeypatch, "keep", "shop", path, *words)
    (place / "cli.py").write_text("print(1)\n")
    with pytest.raises(SystemExit, match=r"differs from its commit .*cli\.py"):
        run(monkeypatch, "keep", "shop", path, *words)
    run(monkeypatch, "keep", "shop", path, *words, "--commit", "HEAD")
    with pytest.raises(SystemExit, match="give --section and --title"):
        run(monkeypatch, "keep", "new", path, "--command", "tpad evaluate")
