"""Tests `tpad ablate`: cells are ordinary runs, made once, in parallel or one by one, and resumed after a kill."""

import csv
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cli
from helpers.processes import ENVIRONMENT, ROOT, command, kill_when, start
from helpers.runs import PHASES, SETTINGS, STEPS, losses, published_folder, same, settings, weights
from pipeline.core.errors import ARTIFACT, USAGE
from recommender.experiments.ablate import Cell, ablate
from recommender.serving.recommender import Recommender

SBR = "sbr.epochs=1"


def ablate_run(run: Path, data: Path) -> None:
    torch.set_num_threads(1)
    ablate(settings(SBR), run, data, ["merge"], [0], 1, cli.make_run)


def tpad_ablate(run: Path, data: Path, *more: str) -> list[str]:
    options = [word for setting in (*SETTINGS, SBR) for word in ("--set", setting)]
    return ["ablate", "--run", str(run), "--data", str(data), *options, *more]


@pytest.fixture(scope="module")
def killed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation that was killed inside a phase, and inside its second cell, and then ended."""
    run = tmp_path_factory.mktemp("ablation")
    for begun in (run / "full-0" / "distill" / "transfer" / "step-000002" / "state.json", run / "merge-0" / "run.json"):
        kill_when(start(ablate_run, run, tiny_data), begun.exists)
    assert not (run / "merge-0" / "sbr" / "current").exists()
    ablate_run(run, tiny_data)
    return run


def test_killed_anywhere_it_ends_with_the_weights_of_an_undisturbed_run(killed: Path, tiny_run: Path) -> None:
    assert same(weights(killed / "full-0"), weights(tiny_run))
    assert losses(killed / "full-0") == losses(tiny_run)


def test_a_phase_of_two_cells_is_trained_once(killed: Path) -> None:
    for phase in ("knowledge", "transfer"):
        one, other = (killed / cell / "distill" / phase / f"step-{STEPS:06d}" / "tensors.safetensors" for cell in ("full-0", "merge-0"))
        assert one.samefile(other)
    assert not (killed / "merge-0" / "distill" / "metrics.jsonl").exists()  # not one step of its own
    assert not same(weights(killed / "full-0"), weights(killed / "merge-0"))


def test_id_only_is_trained_once_a_seed(killed: Path) -> None:
    trained = {
        cell: json.loads((published_folder(killed / cell, "sbr") / "metrics.json").read_text())["results"] for cell in ("full-0", "merge-0")
    }
    assert "ID-only" in trained["full-0"] and "ID-only" not in trained["merge-0"]
    assert "full" in trained["merge-0"]


def test_a_cell_is_a_run_like_any_other(killed: Path) -> None:
    assert len(Recommender.load(killed / "merge-0").recommend(["p0001"], k=3).items) == 3
    done = CliRunner().invoke(cli.app, ["distill", "--run", str(killed / "merge-0")])
    assert done.exit_code == 0 and "up to date" in done.stderr


def test_a_finished_one_does_nothing_again(killed: Path, tiny_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("current")}
    assert len(before) == 6
    ablate_run(killed, tiny_data)
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("current")} == before


def test_the_table_has_what_the_cells_published(killed: Path, tiny_data: Path) -> None:
    csv_lines = {(line["variant"], line["metric"]): line for line in csv.DictReader((killed / "ablation.csv").read_text().splitlines())}
    assert {variant for variant, _ in csv_lines} == {"full", "merge", "ID-only", "content-only"}
    for cell, model in (("full-0", "full"), ("merge-0", "full"), ("full-0", "ID-only")):
        mean = json.loads((published_folder(killed / cell, "sbr") / "metrics.json").read_text())["results"][model]["mean"]
        name = model if model == "ID-only" else cell.removesuffix("-0")
        for metric, bucket in (("HR@10", "all"), ("MRR@20", "all"), ("HR@20", "warm"), ("HR@20", "cold")):
            line = csv_lines[name, metric if bucket == "all" else f"{bucket} {metric}"]
            assert float(line["mean"]) == pytest.approx(mean[bucket][metric])
    line = csv_lines["merge", "HR@10"]
    assert float(line["difference"]) == pytest.approx(float(line["mean"]) - float(csv_lines["full", "HR@10"]["mean"]))
    assert float(line["low"]) <= float(line["difference"]) <= float(line["high"]) and 0 < float(line["p"]) <= 1
    for metric in ("retrieval HR@20 of knowledge", "accuracy of motif from transition", "CKA", "CLUB", "export seconds per 1000 items"):
        assert ("full", metric) in csv_lines and ("merge", metric) in csv_lines
    seconds = {variant: float(csv_lines[variant, "training seconds"]["mean"]) for variant in ("full", "merge")}
    assert seconds["full"] > seconds["merge"] > 0  # which stops before the alignment
    assert (killed / "ablation.png").read_bytes().startswith(b"\x89PNG")
    text = (killed / "ablation.md").read_text()
    assert re.search(r"^\| merge \|( 0\.\d{4} \|)+$", text, re.MULTILINE)
    again = CliRunner().invoke(cli.app, tpad_ablate(killed, tiny_data, "--variants", "merge", "--table"))
    assert again.exit_code == 0, again.stderr
    assert again.stdout.strip() == text.strip() == (killed / "ablation.md").read_text().strip()


@pytest.mark.parametrize(
    ("words", "lacks"), [(["--variants", "knowledge"], "knowledge-0"), (["--variants", "merge", "--seeds", "2"], "full-1")]
)
def test_a_table_of_runs_that_are_not_there_is_one_line(killed: Path, tiny_data: Path, words: list[str], lacks: str) -> None:
    done = CliRunner().invoke(cli.app, tpad_ablate(killed, tiny_data, *words, "--table"))
    assert done.exit_code == ARTIFACT
    assert lacks in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_several_at_a_time_in_processes_that_end_with_the_main_one(killed: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    words = command(*tpad_ablate(run, tiny_data, "--variants", "knowledge,no_relation", "--seeds", "2", "--jobs", "2"))
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun, trained = run / "full-1" / "distill" / "metrics.jsonl", 0
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while (now := begun.stat().st_size) != trained:  # its processes go too, or they would write beside the next ones
        trained = now
        time.sleep(0.3)
    assert not (run / "full-1" / "mllm" / "current").exists()
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for cell in ("full-0", "knowledge-0", "no_relation-0", "full-1", "knowledge-1", "no_relation-1"):
        assert (run / cell / "sbr" / "current").exists()
    assert {phase for phase, _ in losses(run / "full-1")} == set(PHASES)
    assert {phase for phase, _ in losses(run / "no_relation-1")} == {"align"}
    assert not same(weights(run / "full-1"), weights(run / "full-0"))


def test_full_is_trained_whatever_models_a_run_has() -> None:
    config = settings("sbr.models=[ID-only]")
    assert Cell("full", 0).settings(config).sbr.models == ["ID-only", "full"]
    assert Cell("knowledge", 0).settings(config).sbr.models == ["full"]


def test_a_wrong_option_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["ablate", "--run", str(tmp_path / "run"), "--variants", "no_views"])
    assert done.exit_code == USAGE
    assert done.stderr.startswith("error: ") and "no variant `no_views`" in done.stderr
    assert not (tmp_path / "run").exists()


def test_settings_that_a_variant_cannot_have_are_one_line_before_anything_is_trained(tiny_data: Path, tmp_path: Path) -> None:
    only_frozen = ("--set", "distill.variant=frozen", "--set", "backbone.dtype=bfloat16")
    done = CliRunner().invoke(cli.app, tpad_ablate(tmp_path / "run", tiny_data, "--variants", "frozen", *only_frozen))
    assert done.exit_code == USAGE
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: `backbone.dtype` = 'bfloat16'") and "(variant full)" in last
    assert "cell:" not in done.stderr
