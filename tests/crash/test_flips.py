"""One flipped bit, or a cut, in any file: it is refused, or what it damaged is made again; never believed."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import contents
from pipeline.core.artifact import open_verified
from pipeline.core.config_file import load_config
from pipeline.core.errors import UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.data.session_log import load_sessions
from pipeline.run_folder import open_run, remember
from recommender.experiments.evaluate import evaluate
from recommender.serving.recommender import Recommender
from recommender.training.train import train_sbr

SEED = 29
SETTINGS = load_config(None, ["sbr.dim=8", "sbr.epochs=2", "sbr.batch=32", "sbr.models=[ID-only, full]"])
FEW, MANY = 50, 500  # of each kind of folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flips") / "run"
    group = write_data(run / "data", items=40, sessions=120)
    for path in (run / "data").iterdir():  # as `tpad prepare` writes it
        pq.write_table(pq.read_table(path), path, compression="zstd", write_page_checksum=True)
    publish_embeddings(run, run / "data", group, SETTINGS)
    train_sbr(SETTINGS, run, run / "data")
    remember(run, run / "data", SETTINGS)
    return run


def damages(rng: random.Random, data: bytes) -> bytes:
    """The content with one bit flipped, or cut off somewhere."""
    place = rng.randrange(len(data))
    if rng.random() < 0.2:
        return data[:place]
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def damaged_copies(folder: Path, copy: Path, times: int, choose: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
    """Damages one file of a copy of a folder, again and again; yields its name while it is damaged."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    shutil.copytree(folder, copy)
    names = sorted(name for name in contents(folder) if (folder / name).stat().st_size and choose(name))
    for n in range(times):
        name = names[n % len(names)]
        sound = (folder / name).read_bytes()
        (copy / name).write_bytes(damages(rng, sound))
        yield name
        (copy / name).write_bytes(sound)


def check(times: int, folder: Path, copy: Path, read: Callable[[Path], object], code: set[int], choose: Callable[[str], bool]) -> int:
    """Checks that a reader of the damaged folder refuses it with a code, or reads what it reads of a sound one; counts the refusals."""
    wanted, refused = read(folder), 0
    for name in damaged_copies(folder, copy, times, choose):
        try:
            found = read(copy)
        except UserError as error:
            assert error.code in code, (name, str(error))
            refused += 1
        else:
            assert found == wanted, name
    return refused


def all_of_artifacts(run: Path) -> object:
    recommender = Recommender.load(run)
    embeddings = read_embeddings(run / "embeddings")
    return recommender.version.manifest_sha256, embeddings.version.manifest_sha256


def all_of_data(run: Path) -> object:
    catalog = load_catalog(run / "data")
    log = load_sessions(run / "data", catalog)
    texts = {name: [catalog.text(row, name) for row in range(len(catalog))] for name in catalog.columns}
    return catalog.item_ids, texts, log.session_ids, log.rows.tolist(), log.times.tolist(), log.users


def all_of_settings(run: Path) -> object:
    with open_run(None, None, run, None) as (settings, folder):
        return settings.model_dump(), folder.relative_to(run.resolve())


@pytest.fixture(autouse=True)
def tell_times(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    if "times" in request.fixturenames:
        record_property("damaged files", request.getfixturevalue("times"))


def published(name: str) -> bool:
    return name.startswith(("sbr/", "embeddings/")) and not name.endswith(".lock")


@pytest.mark.parametrize("times", [2 * FEW, pytest.param(2 * MANY, marks=pytest.mark.slow)])
def test_published_artifacts(run: Path, tmp_path: Path, times: int) -> None:
    assert check(times, run, tmp_path / "run", all_of_artifacts, {4}, published) == times


@pytest.mark.parametrize("times", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_data_folders(run: Path, tmp_path: Path, times: int) -> None:
    assert check(times, run, tmp_path / "run", all_of_data, {3}, lambda name: name.startswith("data/")) > times // 2


@pytest.mark.parametrize("times", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_what_a_run_remembers(run: Path, tmp_path: Path, times: int) -> None:
    assert check(times, run, tmp_path / "run", all_of_settings, {2, 3, 4}, lambda name: name in ("run.json", "config.yaml")) > times // 2


def test_an_mllm(tiny_run: Path, tmp_path: Path) -> None:
    def read(run: Path) -> object:
        return open_verified(run / "mllm", "mllm", "run `tpad distill` first").manifest_sha256

    assert check(20, tiny_run, tmp_path / "run", read, {4}, lambda name: name.startswith("mllm/") and ".lock" not in name) == 20


@pytest.mark.parametrize("times", [8, pytest.param(MANY // 5, marks=pytest.mark.slow)])
def test_stored_results_of_an_evaluation(run: Path, tmp_path: Path, times: int) -> None:
    def evaluated(run: Path, protocol: str) -> object:
        names = ["popularity"] if protocol == "time" else ["popularity", "ID-only"]
        version, _, _ = evaluate(SETTINGS, run, run / "data", protocol, names)
        return json.loads((version.path / "metrics.json").read_bytes())["results"]

    base = shutil.copytree(run, tmp_path / "base")
    for protocol in ("time", "paper-max"):
        evaluated(base, protocol)
        shutil.rmtree(base / "evaluation")  # so that what is stored is read again

    def again(run: Path) -> object:
        results = [evaluated(run, "time")]
        if times > 10:
            results.append(evaluated(run, "paper-max"))
        shutil.rmtree(run / "evaluation")
        return results

    check(times, base, tmp_path / "copy", again, {4}, lambda name: "/found/" in name and not name.endswith(".lock"))


@pytest.mark.slow
def test_the_checkpoints_of_a_training(run: Path, tmp_path: Path) -> None:
    """A damaged checkpoint is left out, and the training ends with the same bytes."""
    from recommender.training import train as training

    kept = tmp_path / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "remove", lambda path: shutil.move(path, kept))  # the last act of a training
        base = shutil.copytree(run, tmp_path / "base")
        train_sbr(SETTINGS, base, base / "data", fresh=True)
    shutil.rmtree(base / "sbr")
    shutil.move(kept, base / "sbr-train" / "checkpoints")

    def ended(run: Path) -> object:
        copy = shutil.copytree(run, tmp_path / "ended")
        version = train_sbr(SETTINGS, copy, copy / "data").version
        weights = contents(version.path)["model.safetensors"]
        shutil.rmtree(copy)
        return weights

    check(40, base, tmp_path / "copy", ended, {4}, lambda name: "checkpoints/" in name)


def test_metrics_of_a_training_that_hold_anything(run: Path, tmp_path: Path) -> None:
    """A log is read leniently: lines that are no entries are dropped."""
    copy = shutil.copytree(run, tmp_path / "run")
    log = copy / "sbr-train" / "metrics.jsonl"
    odd = [b"\xff\xfe", b"[1]", b"null", b"{", b'{"step": "x", "model": 1}', b"[" * 5000]
    odd += [b'{"model": "full", "seed": 0, "loss": 1e999, "step": NaN}']
    log.write_bytes(log.read_bytes() + b"\n".join(odd))
    from recommender.report.html_report import write_report

    assert "Training of the session model" in write_report(copy, None, "").read_text()
    train_sbr(SETTINGS, copy, copy / "data", fresh=True)
    assert all(isinstance(json.loads(line), dict) for line in log.read_text().splitlines())
