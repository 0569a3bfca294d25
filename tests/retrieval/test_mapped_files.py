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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a session model, its data in `data`."""
    run = tmp_path_factory.mktemp("trained")
    group = write_data(run / "data")
    settings = load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.refit=false", "sbr.models=[full]"])
    publish_embeddings(run, run / "data", group, settings)
    train_sbr(settings, run, run / "data")
    return run


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


def test_opening_checks_every_number_and_leaves_no_page_resident(tmp_path: Path) -> None:
    """Each process of a machine opens a file of gigabytes, of which it will use little."""
    path = tmp_path / "t.safetensors"
    save_file({"ids": torch.arange(1000), "vectors": torch.zeros(2**18, 64)}, path)  # 64 MiB
    mapped = mapped_tensors(path)
    _, _, mapping = Path("/proc/self/smaps").read_text().partition(str(path))
    resident = next(line for line in mapping.splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) < 4096, resident  # KiB
    assert mapped["vectors"][-1, -1] == 0
    for place in (0, 2**24 - 1):
        vectors = torch.zeros(2**24)
        vectors[place] = torch.nan
        save_file({"ids": torch.arange(1000), "vectors": vectors.view(-1, 64)}, path)
        with pytest.raises(ValueError, match="vectors has numbers that are not finite"):
            mapped_tensors(path)


def test_a_published_index_of_quantized_vectors_is_opened(trained: Path, tmp_path: Path) -> None:
    """Its vectors have zeros at their end, for pieces of equal length."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    exact = Recommender.load(run)
    refresh(run, run / "data", "IVF1,PQ36x4fs", rebuild=True)
    quantized = Recommender.load(run)
    assert not quantized.index.exact
    session = quantized.sample_rows()[0]
    np.testing.assert_array_equal(quantized.rank([session], 5)[0][0], exact.rank([session], 5)[0][0])


def test_a_large_catalogue_gets_the_answers_of_a_small_one(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    small = Recommender.load(trained)
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
