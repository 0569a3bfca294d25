"""The benchmarks still run: what they measure changes under them."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_the_export_s_methods_give_the_same_vectors(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/export.py", "compare", "--items", "64", "--rounds", "1", "--methods", "plain", "tpad"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heads, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    found = {row[0]: float(row[heads.index("greatest difference")]) for row in rows}
    assert found.keys() == {"plain", "tpad"} and max(found.values()) < 1e-5
