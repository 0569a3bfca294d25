"""Early exit: an export that stops after a layer costs what `measure` says of that layer."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.layers import apart, measure, sample
from helpers.backbones import save_backbone
from helpers.runs import PHASES, distill_run, export_run, published_folder, settings
from pipeline.core.config import BackboneConfig, DataConfig, ExportConfig
from pipeline.core.errors import USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.export.export import export
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.saved_mllm import load_mllm

FEW = [f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=2", "batch=4")]


@pytest.fixture(scope="module", params=["tiny", "qwen3_vl"])
def run(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with all its layers exported: trained in full, or with adapters and DeepStack."""
    root = tmp_path_factory.mktemp("layers")
    if request.param == "tiny":
        more = [*FEW, "backbone.tiny.layers=3"]
    else:
        folder = save_backbone(root / "backbone", request.param)
        more = [*FEW, f"backbone.name={folder}", "backbone.lora.rank=2"]
    distill_run(root / "run", tiny_data, *more)
    export_run(root / "run", tiny_data, *more)
    return root / "run", more


def measured(mllm_folder: Path, data: Path) -> list[dict[str, float]]:
    """The table of `benchmarks/layers.py` without the times."""
    mllm, backbone, saved = load_mllm(mllm_folder, merge=True)
    assert isinstance(mllm, Mllm)
    catalog = load_catalog(data)
    prompts = Prompts(catalog, DataConfig.model_validate(saved["data"]), Templates.model_validate(saved["templates"]))
    encoder = PromptProcessor(BackboneConfig.model_validate(saved["backbone"]), backbone, catalog)
    sequences = [encoder.encode(prompts.item(int(row))) for row in sample(len(catalog), 0)]
    return measure(mllm.eval(), encoder, sequences, ExportConfig().token_budget, torch.device("cpu"))


def test_an_export_that_stops_early_is_as_near_the_full_one_as_measured(
    run: tuple[Path, list[str]], tiny_data: Path, tmp_path: Path
) -> None:
    folder, more = run
    table = measured(published_folder(folder, "mllm"), tiny_data)
    assert len(table) == (3 if "backbone.tiny.layers=3" in more else 2)
    assert table[-1]["knowledge"] == table[-1]["transition"] == 1
    assert all(0 < layer["importance"] < 2 for layer in table)
    full = read_embeddings(folder / "embeddings")
    for count in range(1, len(table)):
        copy = Path(shutil.copytree(folder, tmp_path / str(count)))
        result = export(settings(*more, f"export.layers={count}"), copy, tiny_data, update=True)
        assert result.notes == ["a full export, not an update: how many layers are run changed"]
        early = read_embeddings(copy / "embeddings")
        for half in ("knowledge", "transition"):
            cosine = (getattr(early, half) * getattr(full, half)).sum(1).mean()
            assert cosine == pytest.approx(table[count - 1][half], abs=2e-4)
            assert cosine < 0.9999
        assert early.version.manifest["layers"] == count
        assert f"first {count} layers" in (early.version.path / "README.md").read_text()
        assert not export(settings(*more, f"export.layers={count}"), copy, tiny_data).made
    assert not export(settings(*more, f"export.layers={len(table)}"), folder, tiny_data).made


def test_more_layers_than_there_are_is_one_clear_line(run: tuple[Path, list[str]], tiny_data: Path) -> None:
    folder, more = run
    with pytest.raises(UserError, match=r"export\.layers = 9") as error:
        export(settings(*more, "export.layers=9"), folder, tiny_data)
    assert error.value.code == USAGE


def test_importance_is_the_mean_distance_of_tokens() -> None:
    """Compares with a loop over all pairs."""
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    vision = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
    text = torch.tensor([[1, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
    unit = (states / states.norm(dim=-1, keepdim=True)).numpy()
    for b, given in enumerate(apart(states, vision, text).tolist()):
        v, t = (np.flatnonzero(mask[b]) for mask in (vision, text))
        pairs = [[(i, j) for i in v for j in v if i != j], [(i, j) for i in t for j in t if i != j], [(i, j) for i in v for j in t]]
        means = [np.mean([1 - unit[b, i] @ unit[b, j] for i, j in kind]) for kind in pairs if kind]
        assert given == pytest.approx(np.mean(means), abs=1e-5)
