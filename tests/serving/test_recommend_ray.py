"""Tests `tpad recommend --sessions` on a local Ray of as many workers as cores."""

import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.processes import ENVIRONMENT, ROOT, command, kill_a_ray_worker, tpad
from helpers.server import write_shop
from pipeline.core.errors import USAGE
from pipeline.core.ray_workers import in_order


@pytest.mark.slow
def test_a_killed_worker_costs_no_session_and_no_byte(tiny_data: Path, tmp_path: Path) -> None:
    run, file = write_shop(tmp_path / "run", tiny_data), tmp_path / "events.parquet"
    rng = np.random.default_rng(0)
    items = [f"p{n:04d}" for n in rng.integers(40, size=200_000)]
    pq.write_table(pa.table({"session_id": [f"s{n // 5}" for n in range(len(items))], "item_id": items}), file)
    alone, out = tmp_path / "alone.parquet", tmp_path / "out.parquet"
    assert tpad("recommend", "--run", run, "--sessions", file, "-k", 3, "--out", alone).returncode == 0
    words = command("recommend", "--run", run, "--sessions", file, "-k", 3, "--out", out, "--engine", "ray")
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    killed = kill_a_ray_worker(process, lambda: bool(list(tmp_path.glob(".out.parquet*"))))
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert killed
    assert out.read_bytes() == alone.read_bytes()
    assert f"40000 sessions, 120000 rows: {out}" in told


def test_results_come_in_the_order_of_their_tasks() -> None:
    assert list(in_order([(2, "c"), (0, "a"), (1, "b"), (3, "d")])) == ["a", "b", "c", "d"]


def test_the_engine_is_for_files(tmp_path: Path) -> None:
    done = tpad("recommend", "--run", tmp_path, "--engine", "ray")
    assert (done.returncode, done.stderr.count("\n")) == (USAGE, 1)
    assert "--engine ray is for --sessions FILE" in done.stderr
