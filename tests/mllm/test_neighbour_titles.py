"""Tests neighbour titles: which are shown with an item that lacks its image or text, when, and their effect."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers.runs import PHASES, distill_run, export_run, published_folder, settings
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.export.export import export
from pipeline.mllm.neighbour_titles import load_neighbours
from pipeline.mllm.prompts import FULL, Prompts, View

FEW = [f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=4", "batch=4")]
LACKING = (3, 7, 11)  # rows without an image


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def changed(data: Path, to: Path, titles: dict[int, str] | None = None) -> Path:
    """Copies the data folder without some images and with other `titles`."""
    shutil.copytree(data, to)
    table = pq.read_table(to / "items.parquet")
    rows = table.to_pylist()
    for row in LACKING:
        rows[row]["image"] = None
    for row, title in (titles or {}).items():
        rows[row]["title"] = title
    pq.write_table(table.from_pylist(rows, table.schema), to / "items.parquet")
    return to


def use(run: Path, *more: str) -> list[str]:
    return [f"data.neighbours.run={run}", "data.neighbours.least=-1", *FEW, *more]


@pytest.fixture(scope="module")
def near_run(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a run that shows neighbours by the vectors of another run, and its data."""
    root = tmp_path_factory.mktemp("near")
    data = changed(tiny_data, root / "data")
    distill_run(root / "run", data, *use(tiny_run))
    export_run(root / "run", data, *use(tiny_run))
    return root / "run", data


def near(run: Path, data: Path, *more: str) -> Prompts:
    config, catalog = settings(f"data.neighbours.run={run}", *more), load_catalog(data)
    sessions = read_embeddings(run / "embeddings").version.manifest["sessions_sha256"]
    return Prompts(catalog, config.data, neighbours=load_neighbours(config.data.neighbours, catalog, sessions))


def words(prompts: Prompts, row: int, view: View = FULL) -> str:
    return " ".join(part.text for part in prompts.item(row, view))


def test_what_is_shown_are_the_titles_of_the_nearest_that_have_both(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = changed(tiny_data, tmp_path / "data", {5: ""})
    copy = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    export_run(copy, data)
    prompts = near(copy, data, "data.neighbours.least=-1")
    k, titles = read_embeddings(copy / "embeddings").knowledge, load_catalog(data).titles
    for row in (3, 5, 20):
        order = [int(n) for n in np.argsort(-(k @ k[row]), kind="stable") if n not in (row, 5, *LACKING)]
        shown = "; ".join(titles[n] for n in order[:3])
        assert shown in words(prompts, row, View(True, False))
        assert (shown in words(prompts, row)) == (row != 20)  # which has both, if nothing is withheld
    gate = float(np.sort(np.delete(k @ k[3], [3, 5, *LACKING]))[-2]) + 1e-4
    one = near(copy, data, f"data.neighbours.least={gate}")
    assert len(one.similar(3).split("; ")) == 1
    assert "Similar" not in words(near(copy, data, "data.neighbours.least=1"), 3)


def test_an_item_that_run_does_not_know_is_shown_none(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = changed(tiny_data, tmp_path / "data")
    table = pq.read_table(data / "items.parquet")
    rows = table.to_pylist()
    rows[3]["item_id"] = "new"
    pq.write_table(table.from_pylist(rows, table.schema), data / "items.parquet")
    prompts = near(tiny_run, data, "data.neighbours.least=-1")
    assert "Similar" not in words(prompts, 3)
    assert "Similar" in words(prompts, 7)


def test_shown_fewer_neighbours_it_is_another_training(near_run: tuple[Path, Path], tiny_run: Path) -> None:
    run, data = near_run
    assert not distill_run(run, data, *use(tiny_run))
    with pytest.raises(UserError, match="other settings or data") as error:
        distill_run(run, data, *use(tiny_run, "data.neighbours.count=2"))
    assert error.value.code == ARTIFACT


def test_an_update_follows_the_titles_that_are_shown(near_run: tuple[Path, Path], tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(near_run[0], tmp_path / "run"))
    manifest = json.loads((published_folder(run, "embeddings") / "manifest.json").read_text())
    assert manifest["neighbours"] == read_embeddings(tiny_run / "embeddings").version.manifest_sha256
    for kind in ("mllm", "embeddings"):
        assert not any(str(tiny_run).encode() in path.read_bytes() for path in published_folder(run, kind).iterdir())
    prompts = near(tiny_run, near_run[1], "data.neighbours.least=-1")
    titles = load_catalog(near_run[1]).titles
    nearest = titles.index(prompts.similar(3).split("; ")[0])
    data = changed(tiny_data, tmp_path / "data", {nearest: "a new name"})
    result = export(settings(*use(tiny_run)), run, data, update=True)
    showing = [row for row in LACKING if "a new name" in near(tiny_run, data, "data.neighbours.least=-1").similar(row)]
    assert 3 in showing
    assert result.work.items == 1 + len(showing)
    # other vectors of the neighbours: anything may be near now
    other = Path(shutil.copytree(tiny_run, tmp_path / "other"))
    export_run(other, tiny_data, "export.dtype=float16")
    result = export(settings(*use(other)), run, data, update=True)
    assert result.notes == ["a full export, not an update: the neighbours of items that lack something changed"]
    result = export(settings(*FEW), run, data, update=True)  # without any, for once
    assert result.notes and result.version is not None and result.version.manifest["neighbours"] is None


def test_neighbours_of_other_sessions_or_for_a_model_that_knows_none_are_refused(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other training sessions") as error:
        distill_run(tmp_path, tiny_data, *use(tiny_run, "data.valid=0.2"))
    assert error.value.code == ARTIFACT
    with pytest.raises(UserError, match="not found") as error:
        distill_run(tmp_path, tiny_data, *use(tmp_path))
    assert error.value.code == ARTIFACT
    with pytest.raises(UserError, match=r"trained without neighbours .*data\.neighbours\.run") as error:
        export(settings(*use(tiny_run)), tiny_run, tiny_data)
    assert error.value.code == USAGE
