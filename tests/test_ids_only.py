"""A click log and nothing else: items of which only the ids are known, from `prepare` to an answer, without embeddings."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.fake_embeddings import write_data
from helpers.processes import tpad
from helpers.server import serving
from pipeline.core.config_file import load_config
from pipeline.core.errors import USAGE, UserError
from pipeline.data.prepare.prepare import PrepareOptions, prepare
from recommender.report.html_report import write_report
from recommender.serving.live_version import LoadedVersion
from recommender.serving.recommender import Recommender
from recommender.training.rebuild_index import refresh
from recommender.training.train import SbrSummary, train_sbr

SETTINGS = ["sbr.dim=16", "sbr.epochs=2", "sbr.batch=32", "sbr.lr=0.01", "sbr.models=[GRU4Rec, ID-only]"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("log")
    write_data(data)
    return data / "sessions.parquet"


@pytest.fixture(scope="module")
def made(log: Path) -> tuple[Path, SbrSummary]:
    torch.set_num_threads(1)
    run = log.parent / "run"
    prepare(PrepareOptions(None, log, run / "data"))
    return run, train_sbr(load_config(None, SETTINGS), run, run / "data")


def test_the_items_of_a_log_are_those_of_its_sessions(made: tuple[Path, SbrSummary], log: Path) -> None:
    items = pq.read_table(made[0] / "data" / "items.parquet")
    assert items.column_names == ["item_id", "title"]
    assert set(items["item_id"].to_pylist()) == set(pq.read_table(log)["item_id"].to_pylist())
    assert items["title"].null_count == len(items)


def test_a_run_of_ids_needs_no_embeddings(made: tuple[Path, SbrSummary]) -> None:
    run, found = made
    assert {"GRU4Rec", "ID-only", "popularity"} < found.metrics["results"].keys()
    assert found.metrics["results"]["ID-only"]["mean"]["all"]["HR@10"] > found.metrics["results"]["popularity"]["mean"]["all"]["HR@10"]
    assert not train_sbr(load_config(None, SETTINGS), run, run / "data").made
    recommender = Recommender.load(run)
    items = recommender.recommend(["item-001", "item-008"], k=5).items
    assert [item.title for item in items] == [item.item_id for item in items]  # nothing else to call them by
    assert any(item.after == "item-008" for item in items)
    assert not any(item.similar_to for item in items)
    with pytest.raises(UserError, match="--diversify") as error:
        recommender.recommend(["item-001"], diversify=0.5)
    assert error.value.code == USAGE
    assert "Results" in write_report(run, run / "data", "").read_text()


def test_a_wish_that_a_model_of_ids_cannot_meet_is_refused_by_the_service(made: tuple[Path, SbrSummary]) -> None:
    with serving(made[0]) as server:
        refused = server.ask("/recommend", {"session": ["item-001"], "diversify": 0.5})
        assert (refused.status, refused.json["error"]) == (422, "diversify: the model has no knowledge vectors")
        assert server.ask("/items/item-001/similar?half=knowledge").status == 404


def test_another_index_comes_to_a_model_of_ids(made: tuple[Path, SbrSummary]) -> None:
    run, before = made
    wanted = Recommender.load(run).recommend(["item-001"], k=5)
    found = refresh(run, run / "data", "hnsw")
    assert found.made
    assert (found.added, found.removed) == (0, 0)
    assert found.version.manifest["index"]["setting"] == "hnsw"
    assert [item.item_id for item in Recommender.load(run).recommend(["item-001"], k=5).items] == [item.item_id for item in wanted.items]
    assert json.loads((found.version.path / "metrics.json").read_bytes()) == before.metrics
    assert not refresh(run, run / "data", "hnsw").made
    assert not train_sbr(load_config(None, SETTINGS), run, run / "data").made  # another index is no reason to train


def test_items_that_nobody_has_seen_come_last_with_scores_that_are_numbers(made: tuple[Path, SbrSummary], tmp_path: Path) -> None:
    run = Path(shutil.copytree(made[0], tmp_path / "run"))
    items = pq.read_table(run / "data" / "items.parquet")
    new = pa.table({"item_id": ["new-1", "new-2"], "title": pa.array([None, None], pa.string())})
    pq.write_table(pa.concat_tables([items, new]), run / "data" / "items.parquet")
    assert refresh(run, run / "data", "flat").added == 2
    recommender = Recommender.load(run)
    for dense in (0, len(items) + 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recommender.serving.recommender.FULL_SCORING_ITEMS", dense)
            found = recommender.recommend(["item-001"], k=1000).items
        assert {"new-1", "new-2"} <= {item.item_id for item in found if item.score == found[-1].score}
        assert math.isfinite(found[-1].score)
    assert math.isfinite(LoadedVersion.load(run).recommender.recommend(["new-1"], k=1000).items[-1].score)


def test_the_next_command_can_be_pasted_into_a_shell(log: Path, tmp_path: Path) -> None:
    done = tpad("prepare", "--sessions", log, "--out", tmp_path / "out")
    (tmp_path / "sbr.models=I").touch()  # what the shell would put in place of [ID-only]
    words = done.stderr.strip().removeprefix("next: ")
    seen = subprocess.run(["sh", "-c", f"printf '%s\\n' {words}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines()[-2:] == ["--set", "sbr.models=[ID-only]"]


def test_pictures_without_a_catalogue_are_refused(log: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--items") as error:
        prepare(PrepareOptions(None, log, tmp_path / "out", images=tmp_path))
    assert error.value.code == USAGE
