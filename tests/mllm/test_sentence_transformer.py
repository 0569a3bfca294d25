"""Tests `tpad export-model`: sentence-transformers, which knows nothing of tpad, gives the exported vectors."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from helpers.backbones import save_backbone
from helpers.processes import tpad
from helpers.runs import change_items, distill_run, export_run, settings
from pipeline.core.errors import ENVIRONMENT, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.mllm.sentence_transformer import export_model
from pipeline.run_folder import remember


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def texts(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop without images; one title is longer than any prompt takes, one looks like an image."""
    to = tmp_path_factory.mktemp("texts") / "data"
    titles = {3: "a very long title " * 20, 4: "<image> of a mug"}
    return change_items(tiny_data, to, dict.fromkeys(range(40)), titles)


@pytest.fixture(scope="module")
def qwen(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a backbone with a chat template, whose first tokens its mean leaves out, on texts alone."""
    folder = tmp_path_factory.mktemp("qwen")
    backbone = save_backbone(folder / "backbone", "qwen3_vl")
    more = [f"backbone.name={backbone}", "backbone.max_text_tokens=24"]
    distill_run(folder / "run", texts, *more)
    export_run(folder / "run", texts, *more)
    return folder / "run"


def given(data: Path) -> list[Any]:
    """The items of a catalogue, as a user of sentence-transformers has them."""
    catalog = load_catalog(data)
    columns = [c for c in ("title", "description") if c in catalog.columns]
    texts = [". ".join(text for c in columns if (text := catalog.text(row, c))) for row in range(len(catalog))]
    return [{"text": text, "image": catalog.image(row)} if catalog.has_image(row) else text for row, text in enumerate(texts)]


def check(folder: Path, run: Path, items: list[Any]) -> None:
    model, exported = SentenceTransformer(str(folder), device="cpu"), read_embeddings(run / "embeddings")
    np.testing.assert_allclose(model.encode(items), exported.knowledge, atol=1e-4)
    np.testing.assert_allclose(model.encode(items, task="transition"), exported.transition, atol=1e-4)


def test_items_with_images_get_the_exported_vectors(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert export_model(tiny_run, tiny_data, tmp_path / "model", text_only=False) > 0.99999
    check(tmp_path / "model", tiny_run, given(tiny_data))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_texts_get_the_exported_vectors_long_ones_too(qwen: Path, texts: Path, tmp_path: Path) -> None:
    assert export_model(qwen, texts, tmp_path / "model", text_only=True) > 0.99999
    check(tmp_path / "model", qwen, given(texts))
    assert "vision" not in (tmp_path / "model" / "config.json").read_text()
    # the names that servers look for
    types = [module["type"] for module in json.loads((tmp_path / "model" / "modules.json").read_text())]
    assert types[:2] == [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
    ]  # the names that servers look for


def test_the_command_says_what_it_wrote_and_overwrites_nothing(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    remember(tiny_run, tiny_data, settings())
    done = tpad("export-model", "--run", tiny_run, "--to", tmp_path / "model", "--text-only")
    assert done.returncode == 0, done.stderr
    assert f"model: {tmp_path / 'model'} (loaded by sentence-transformers it gives the vectors" in done.stderr
    again = tpad("export-model", "--run", tiny_run, "--to", tmp_path / "model")
    assert again.returncode == USAGE
    assert "something is there already" in again.stderr


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with torchvision the processor loads")
def test_a_family_whose_processor_lacks_a_package_is_named(qwen: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not load: .*; install what it names, or give --text-only") as error:
        export_model(qwen, texts, tmp_path / "model", text_only=False)
    assert error.value.code == ENVIRONMENT
    assert list(tmp_path.iterdir()) == []


def test_vectors_of_ones_own_are_no_model(tiny_data: Path, tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float32, (40, 8))[:] = np.random.default_rng(0).normal(size=(40, 8))
    (tmp_path / "v.txt").write_text("".join(f"{item}\n" for item in load_catalog(tiny_data).item_ids))
    own = ["backbone.name=vectors", f"backbone.path={tmp_path / 'v.npy'}", "distill.dim=4"]
    distill_run(tmp_path / "run", tiny_data, *own)
    with pytest.raises(UserError, match="the backbone `vectors` has no model") as error:
        export_model(tmp_path / "run", tiny_data, tmp_path / "model", text_only=True)
    assert error.value.code == USAGE
