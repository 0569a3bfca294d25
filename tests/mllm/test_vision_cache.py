"""Tests the vision cache: the tower runs once for each image, and weights and vectors stay the same."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from helpers.backbones import save_backbone
from helpers.processes import kill_when, start
from helpers.runs import PHASES, distill_run, same, settings, weights
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.export.export import export
from pipeline.mllm.backbone import build_backbone
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.vision_cache import VisionCache
from pipeline.mllm.vision_tower import tower

FAMILIES = ("smolvlm", "qwen3_vl", "gemma3")
KEEP = "distill.vision_cache_gb=1"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Runs:
    """The same run twice, without and with cached vision features."""

    def __init__(self, root: Path, family: str, data: Path) -> None:
        self.plain, self.kept, self.data = root / "plain", root / "kept", data
        few = [f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=2", "batch=4")]
        self.settings = [f"backbone.name={save_backbone(root / family, family)}", "backbone.lora.rank=2", *few]
        distill_run(self.plain, data, *self.settings)
        distill_run(self.kept, data, *self.settings, KEEP)


@pytest.fixture(scope="module")
def built_runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    return {family: Runs(tmp_path_factory.mktemp("runs"), family, tiny_data) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def runs(request: pytest.FixtureRequest, built_runs: dict[str, Runs]) -> Runs:
    return built_runs[request.param]


@pytest.fixture
def smol(built_runs: dict[str, Runs]) -> Runs:
    return built_runs["smolvlm"]


def shards(run: Path) -> list[Path]:
    return sorted((run / "vision").glob("*/*.safetensors"))


def close(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-5, rtol=0) for name in ours)


def decoded(run: Path, of: Runs, data: Path | None = None, *more: str) -> float:
    """Exports; seconds spent on decoding images."""
    return export(settings(*of.settings, *more), run, data or of.data).work.decoding


def same_vectors(one: Path, other: Path) -> bool:
    ours, theirs = read_embeddings(one / "embeddings"), read_embeddings(other / "embeddings")
    return all(np.allclose(getattr(ours, half), getattr(theirs, half), atol=1e-5) for half in ("knowledge", "transition"))


def test_cached_images_change_neither_weights_nor_vectors_and_are_not_decoded(runs: Runs) -> None:
    assert not (runs.plain / "vision").exists()
    assert len(shards(runs.kept)) == 1
    assert close(runs.plain, runs.kept)
    assert decoded(runs.plain, runs) > 0
    assert decoded(runs.kept, runs) == 0
    assert same_vectors(runs.plain, runs.kept)


def test_a_cached_image_needs_no_tower(runs: Runs) -> None:
    config, catalog = settings(*runs.settings), load_catalog(runs.data)
    prompts = Prompts(catalog, config.data)
    backbone = build_backbone(config.backbone, prompts, 0)
    mllm = Mllm(backbone.model, ("knowledge",), 8).eval()

    def features(processor: PromptProcessor) -> torch.Tensor:
        sequences = [processor.encode(prompts.item(row)) for row in range(8)]
        with torch.no_grad():
            return mllm(processor.collate({"items": sequences}), {"items": ("knowledge",)})["items.knowledge"]

    computed = features(PromptProcessor(config.backbone, backbone, catalog))
    cache = VisionCache(runs.kept / "vision", backbone, None)
    processor = PromptProcessor(config.backbone, backbone, catalog, vision_cache=cache)
    assert torch.equal(features(processor), computed)
    everything = cache.place
    cache.place = dict(list(everything.items())[::2])  # every other one goes through the tower
    torch.testing.assert_close(features(processor), computed, atol=1e-6, rtol=0)
    cache.place = everything
    with torch.no_grad():
        for weight in tower(backbone.model).values():
            weight.fill_(torch.nan)
    assert torch.equal(features(processor), computed)
    assert not VisionCache(runs.kept / "vision", backbone, None).place  # of another tower


def test_a_changed_image_or_budget_is_another(runs: Runs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(runs.data, data)
    table = pq.read_table(data / "items.parquet")
    images = table["image"].to_pylist()
    with Image.open(io.BytesIO(images[0]["bytes"])) as image:
        buffer = io.BytesIO()
        ImageOps.invert(image.convert("RGB")).save(buffer, "PNG")
    images[0]["bytes"] = buffer.getvalue()
    changed = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, table.schema.field("image").type))
    pq.write_table(changed, data / "items.parquet")
    for name, run in (("plain", runs.plain), ("kept", runs.kept)):
        shutil.copytree(run / "mllm", tmp_path / name / "mllm")
    shutil.copytree(runs.kept / "vision", tmp_path / "kept" / "vision")
    decoded(tmp_path / "plain", runs, data)
    assert decoded(tmp_path / "kept", runs, data) > 0
    assert same_vectors(tmp_path / "plain", tmp_path / "kept")
    if runs.settings[0].endswith("qwen3_vl"):
        for name in ("plain", "kept"):
            assert decoded(tmp_path / name, runs, runs.data, "export.max_pixels=128") > 0
        assert same_vectors(tmp_path / "plain", tmp_path / "kept")


def test_damaged_files_are_dropped_and_made_again(smol: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoded(smol.plain, smol)
    sound = shards(smol.kept)[0].read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) * 3 // 4] ^= 1
    for number, damage in enumerate((bytes(flipped), sound[: len(sound) // 2], b"")):
        run = tmp_path / str(number)
        shutil.copytree(smol.kept, run, ignore=shutil.ignore_patterns("embeddings"))
        shards(run)[0].write_bytes(damage)
        assert decoded(run, smol) > 0
        assert "damaged" in capsys.readouterr().err
        assert same_vectors(run, smol.plain)
        assert not shards(run)
    assert distill_run(run, smol.data, *smol.settings, KEEP, "distill.align.relation=0.5", fresh=True)
    assert [path.name for path in shards(run)] == [path.name for path in shards(smol.kept)]


def test_killed_while_it_fills_it_ends_with_the_weights_of_an_undisturbed_run(smol: Runs, tmp_path: Path) -> None:
    kill_when(start(distill_run, tmp_path, smol.data, *smol.settings, KEEP), (tmp_path / "vision").exists)
    assert not (tmp_path / "distill" / "knowledge").exists()
    assert distill_run(tmp_path, smol.data, *smol.settings, KEEP)
    assert same(weights(tmp_path), weights(smol.kept))
    assert [path.name for path in shards(tmp_path)] == [path.name for path in shards(smol.kept)]


def test_it_keeps_no_more_than_it_may(smol: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = shards(smol.kept)[0].stat().st_size
    distill_run(tmp_path, smol.data, *smol.settings, f"distill.vision_cache_gb={size * 0.6 / 1e9}")
    assert "vision cache is full" in capsys.readouterr().err
    assert size * 0.3 < sum(path.stat().st_size for path in shards(tmp_path)) < size * 0.61
    assert close(tmp_path, smol.plain)


def test_nothing_is_kept_of_a_tower_that_trains(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill_run(tmp_path, tiny_data, KEEP)
    assert "the vision tower trains" in capsys.readouterr().err
    assert not (tmp_path / "vision").exists()
    assert same(weights(tmp_path), weights(tiny_run))
