"""What several test files share: one small shop, and one finished run over it. Tests read them, and change copies only."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: equal bits need equal threads, here and in subprocesses
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_run import settings

    from pipeline.shop import draw_shop

    data = tmp_path_factory.mktemp("shop") / "data"
    draw_shop(data, settings().shop, settings().data)
    return data


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with its MLLM and its embeddings."""
    from tiny_run import distill_run, export_run

    run = tmp_path_factory.mktemp("run")
    assert distill_run(run, tiny_data)
    export_run(run, tiny_data)
    return run
