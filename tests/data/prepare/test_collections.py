"""Tests collections that the library `datasets` reads: saved datasets, folders of images, archives; and that it reads our embeddings."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.prepare.prepare import PrepareOptions, PrepareSummary, prepare

datasets = pytest.importorskip("datasets")
LOG = "session_id,item_id,timestamp\na,1,1700000000\na,2,1700000001\n"


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def run(folder: Path, items: str) -> PrepareSummary:
    (folder / "log.csv").write_text(LOG)
    return prepare(PrepareOptions([items], folder / "log.csv", folder / "out"))


def check(folder: Path, titles: list[str]) -> None:
    catalog = load_catalog(folder / "out")
    assert catalog.item_ids == ["1", "2"] and catalog.titles == titles
    assert [catalog.image(row).getpixel((0, 0))[0] for row in range(2)] == [10, 20]  # type: ignore[union-attr,index]


def test_a_saved_dataset(tmp_path: Path) -> None:
    features = datasets.Features({"item_id": datasets.Value("string"), "title": datasets.Value("string"), "image": datasets.Image()})
    rows = {"item_id": ["1", "2"], "title": ["A", "B"], "image": [{"bytes": png(10), "path": None}, {"bytes": png(20), "path": None}]}
    saved = datasets.Dataset.from_dict(rows, features)
    saved.save_to_disk(str(tmp_path / "saved"))
    run(tmp_path, str(tmp_path / "saved"))
    check(tmp_path, ["A", "B"])
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "parts"))
    with pytest.raises(UserError, match=r"several splits .*train, test.*@train"):
        run(tmp_path, str(tmp_path / "parts"))
    run(tmp_path, f"{tmp_path / 'parts'}@train")
    check(tmp_path, ["A", "B"])


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_of_images_with_metadata(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [{"file_name": f"{n}.png", "item_id": str(n), "title": f"T{n}"} for n in (1, 2)]
    for n in (1, 2):
        (folder / f"{n}.png").write_bytes(png(10 * n))
    text = "file_name,item_id,title\n1.png,1,T1\n2.png,2,T2\n" if name.endswith("csv") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text)
    run(tmp_path, str(folder))
    check(tmp_path, ["T1", "T2"])


def test_a_webdataset(tmp_path: Path) -> None:
    for n in (1, 2):
        with tarfile.open(tmp_path / f"shard-{n}.tar", "w") as archive:
            for suffix, data in (("png", png(10 * n)), ("json", json.dumps({"title": f"T{n}"}).encode())):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (tmp_path / "shards").mkdir()
    for n in (1, 2):
        (tmp_path / f"shard-{n}.tar").rename(tmp_path / "shards" / f"shard-{n}.tar")
    run(tmp_path, str(tmp_path / "shards"))
    check(tmp_path, ["T1", "T2"])


def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="hf:OWNER/NAME") as caught:
        run(tmp_path, "hf:nope")
    assert caught.value.code == USAGE
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="not readable as a dataset") as caught:
        run(tmp_path, str(tmp_path / "saved"))
    assert caught.value.code == DATA and "\n" not in str(caught.value)
