"""What several test files share: one small shop, and one finished run over it. Tests read them, and change copies only."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: equal bits need equal threads, here and in subprocesses
from pathlib import Path

import pytest

LONG = ("test_fsdp", "test_train_sbr", "test_docs", "test_backbones", "test_distill", "test_search", "test_ablate", "test_transfer")
LONG += ("test_refit", "test_update", "test_kill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: whole files go to processes, and one that comes last keeps the others waiting."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """What is imported by now stays, so that no later collection of garbage goes through it again: a fifth of a short distillation."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise DuckDB's binding reports leaks at the exit


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.runs import settings
    from pipeline.data.sample_shop import draw_shop

    data = tmp_path_factory.mktemp("shop") / "data"
    draw_shop(data, settings().shop, settings().data)
    return data


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with its MLLM and its embeddings."""
    from helpers.runs import distill_run, export_run

    run = tmp_path_factory.mktemp("run")
    assert distill_run(run, tiny_data)
    export_run(run, tiny_data)
    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six items of helpers/items.py."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from helpers.items import ITEMS, image_of

    folder = tmp_path_factory.mktemp("items")
    images = pa.array([image_of(colour) for _, _, colour in ITEMS.values()], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {"item_id": list(ITEMS), "title": [t for t, _, _ in ITEMS.values()], "material": [m for _, m, _ in ITEMS.values()]}
    pq.write_table(pa.table({**columns, "image": images}), folder / "items.parquet")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of each family, by its name."""
    from helpers.backbones import FAMILIES, save_backbone

    root = tmp_path_factory.mktemp("backbones")
    for family in FAMILIES:
        save_backbone(root / family, family)
    return root
