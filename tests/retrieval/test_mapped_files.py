"""Tests the files of a large catalogue: mapped, they give what the same files in memory give."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.fake_embeddings import publish_embeddings, write_data
from pipeline.core.config_file import load_config
from recommender.retrieval import mapped_files
from recommender.retrieval.mapped_files import ORDER, MappedRows, MappedTexts, mapped_tensors
from recommender.serving.recommender import Recommender
from recommender.session_model import numpy_model
from recommender.session_model.numpy_model import ChannelVectors
from recommender.training.rebuild_index import refresh
from recommender.training.train import train_sbr


def test_mapped_tensors_are_those_of_the_file_and_cannot_be_changed(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7),
        "c": torch.tensor([True, False]),
        "d": torch.empty(0, 4),
        "e": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    mapped = mapped_tensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").unlink()  # as a version that is pruned while it serves
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(mapped[name], tensor.numpy())
        assert mapped[name].dtype == tensor.numpy().dtype
    with pytest.raises(ValueError, match="read-only"):
        mapped["a"][0, 0] = 1.0


def test_a_large_catalogue_gets_the_answers_of_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = write_data(tmp_path / "data")
    settings = load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.refit=false", "sbr.models=[full]"])
    publish_embeddings(tmp_path, tmp_path / "data", group, settings)
    train_sbr(settings, tmp_path, tmp_path / "data")
    small = Recommender.load(Path(shutil.copytree(tmp_path, tmp_path.with_name("small"))))
    for module in (mapped_files, numpy_model):
        monkeypatch.setattr(module, "LARGE_ITEMS", 10)
    refresh(tmp_path, tmp_path / "data", rebuild=True)
    large = Recommender.load(tmp_path)
    assert (large.version.path / ORDER).is_file()
    assert isinstance(large.item_ids, MappedTexts) and isinstance(large.row, MappedRows)
    assert all(isinstance(vectors, ChannelVectors) for vectors in large.ranker.vectors.values())
    assert dict(large.row) == small.row and list(large.titles) == small.titles
    assert "nonsense" not in large.row and "" not in large.row and "\ud800" not in large.row
    sessions = [["item-003"], ["item-004", "nonsense", "item-041"], ["item-010", "item-011", "item-010"], []]
    for session in [*sessions, *small.samples[:10]]:
        one, other = small.recommend(session, 7), large.recommend(session, 7)
        assert [item[:3] for item in one.items] == [item[:3] for item in other.items]
        assert [item[4:] for item in one.items] == [item[4:] for item in other.items]
        np.testing.assert_allclose([item.score for item in one.items], [item.score for item in other.items], atol=1e-5)
