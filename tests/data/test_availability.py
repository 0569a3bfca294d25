"""Tests availability: read, prepared, and respected in training (negatives), evaluation (candidates) and recommendation."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import cli
from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.server import serving
from helpers.session_models import COLD, ITEMS, random_model
from pipeline.core.config_file import load_config
from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.availability import ALWAYS, NEVER, Availability
from pipeline.data.catalog import load_catalog
from pipeline.data.prepare.prepare import PrepareOptions, prepare
from recommender.baselines.registry import build_baseline
from recommender.metrics.evaluator import baseline_ranks, model_ranks
from recommender.metrics.ranks import target_ranks
from recommender.retrieval.saved_model import load_model
from recommender.serving.recommender import Recommender
from recommender.session_model.losses import log_partition
from recommender.session_model.model import SessionModel
from recommender.session_model.negative_sampling import Candidates, everything
from recommender.session_model.windows import PAD, prefixes_of
from recommender.training.dataset import TrainingData, load_training_data
from recommender.training.train import train_sbr
from recommender.training.trainer import build_model

SETTINGS = load_config(None, ["sbr.dim=8", "sbr.epochs=2", "sbr.batch=64", "sbr.lr=0.01", "sbr.models=[full]"])
LAUNCH = 1_600_320_000  # start of the first session with a cold item
GONE = 1_600_300_000  # item-003 is sold out, though later sessions contain it
FUTURE = datetime(2100, 1, 1, tzinfo=UTC)
END_OF_TIME = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # what shops write for "no end"


def limit(data: Path, **columns: object) -> None:
    """Adds the columns to items.parquet."""
    table = pq.read_table(data / "items.parquet")
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(table, data / "items.parquet")


def write_catalogue(folder: Path, **columns: object) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], "title": ["A", "B", "C"]}), folder / "items.parquet")
    limit(folder, **columns)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """item-052 to item-057 are launched with the first session that has them, item-058 and item-059 in 2100, item-003 is sold out."""
    run = tmp_path_factory.mktemp("run")
    group = write_data(run / "data")
    launch = datetime.fromtimestamp(LAUNCH, UTC)
    begin = [*[None] * 52, *[launch] * 6, FUTURE, FUTURE]
    end = [None, None, None, datetime.fromtimestamp(GONE, UTC), END_OF_TIME, *[None] * 55]
    kind = pa.timestamp("us", "UTC")
    limit(run / "data", available_from=pa.array(begin, kind), available_until=pa.array(end, kind))
    publish_embeddings(run, run / "data", group, SETTINGS)
    train_sbr(SETTINGS, run, run / "data")
    (run / "run.json").write_text('{"data": "data"}')
    return run


@pytest.fixture(scope="module")
def inputs(run: Path) -> TrainingData:
    return load_training_data(SETTINGS, run, run / "data")


@pytest.fixture(scope="module")
def recommender(run: Path) -> Recommender:
    return Recommender.load(run)


# --- the columns


@pytest.mark.parametrize("kind", [pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")] + [pa.timestamp("us", "Europe/Berlin")])
def test_timestamps_of_every_unit_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    moment = datetime(2024, 5, 1, 12, 30, 15, tzinfo=UTC)
    data = write_catalogue(
        tmp_path, available_from=pa.array([moment, None, None], kind), available_until=pa.array([None, moment, None], kind)
    )
    result = load_catalog(data).availability
    assert result is not None
    assert result.begin.tolist() == [int(moment.timestamp()), ALWAYS, ALWAYS]
    assert result.end.tolist() == [NEVER, int(moment.timestamp()), NEVER]
    second = int(moment.timestamp())
    assert result.at(second - 1).tolist() == [False, True, True] and result.at(second).tolist() == [True, False, True]


def test_whole_numbers_are_seconds_or_milliseconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, factor in (("s", 1), ("ms", 1000)):
        result = load_catalog(write_catalogue(tmp_path / name, available_from=[None, 1_600_000_000 * factor, None])).availability
        assert result is not None
        assert (result.begin.tolist(), result.end.tolist()) == ([ALWAYS, 1_600_000_000, ALWAYS], [NEVER] * 3)
        assert ("read as milliseconds" in capsys.readouterr().err) == (name == "ms")


def test_a_column_without_a_value_sets_no_limit(tmp_path: Path) -> None:
    assert (
        load_catalog(write_catalogue(tmp_path, available_from=pa.nulls(3), available_until=pa.nulls(3, pa.string()))).availability is None
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"available_from": ["2024-01-01", None, None]}, ["`available_from`", "wrong type", "string"]),
        ({"available_until": [1.5, None, 2.5]}, ["`available_until`", "wrong type", "double"]),
        ({"available_from": [None, 20, None], "available_until": [30, 10, 30]}, ["ends before it begins", "row 1"]),
        ({"available_from": [None, None, 20], "available_until": [None, None, 20]}, ["ends before it begins", "row 2"]),
        ({"available_from": [None, 1_600_000_000, 1_600_000_000_000]}, ["partly in seconds", "row 1"]),
        ({"available_until": [None, None, 10**17]}, ["neither in seconds nor in milliseconds", "row 2"]),
    ],
)
def test_what_is_no_time_is_one_line_with_file_and_row(tmp_path: Path, columns: dict[str, list[object]], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_catalog(write_catalogue(tmp_path, **columns))
    assert error.value.code == DATA and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [*words, "items.parquet"]), str(error.value)


def test_prepare_keeps_both_columns_as_timestamps(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,title,Available From,available_until,colour\n"
        "a,A,2024-01-31,9999-12-31T23:59:59,red\n"
        "b,B,,2024-02-01T10:00:00+02:00,blue\n"
        "c,C,,,green\n"
    )
    (tmp_path / "log.csv").write_text("session_id,item_id,timestamp\ns,a,1700000000\ns,b,1700000001\nt,a,1700000002\nt,c,1700000003\n")
    prepare(PrepareOptions(tmp_path / "items.csv", tmp_path / "log.csv", tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "items.parquet")
    assert {table.schema.field(name).type for name in ("available_from", "available_until")} == {pa.timestamp("ms")}
    assert table["available_from"].to_pylist() == [datetime(2024, 1, 31), None, None]
    assert table["available_until"].to_pylist() == [datetime(9999, 12, 31, 23, 59, 59), datetime(2024, 2, 1, 8), None]
    catalog = load_catalog(tmp_path / "out")
    assert catalog.columns == ["title", "colour"] and catalog.availability is not None
    (tmp_path / "items.csv").write_text("item_id,title,available_from,available_until\na,A,,\nb,B,2024-02-01,2024-01-01\n")
    with pytest.raises(UserError, match=r"ends before it begins \(\S+/items\.csv row 1\)") as error:
        prepare(PrepareOptions(tmp_path / "items.csv", tmp_path / "log.csv", tmp_path / "other"))
    assert error.value.code == DATA and not (tmp_path / "other").exists()
    (tmp_path / "items.csv").write_text("item_id,title,available_from\na,A,\nb,B,\nc,C,\n")
    prepare(PrepareOptions(tmp_path / "items.csv", tmp_path / "log.csv", tmp_path / "empty"))
    assert load_catalog(tmp_path / "empty").availability is None


def test_the_columns_are_no_attributes(run: Path, recommender: Recommender) -> None:
    catalog = load_catalog(run / "data")
    assert catalog.columns == ["title", "colour", "tags"]
    assert catalog.attributes().keys() == {"colour", "tags"} == {*recommender.attributes.column_names}
    done = CliRunner().invoke(cli.app, ["recommend", "--run", str(run), "--filter", "available_from=2024"])
    assert done.exit_code == USAGE and "no attribute `available_from`" in done.stderr


def test_columns_without_a_value_change_nothing(tmp_path: Path) -> None:
    """The same weights and the same ranks of every model and baseline, bit by bit, as without them."""
    result = []
    for name in ("without", "empty"):
        run = tmp_path / name
        group = write_data(run / "data")
        if name == "empty":
            limit(run / "data", available_from=pa.nulls(60, pa.timestamp("s")), available_until=pa.nulls(60))
        publish_embeddings(run, run / "data", group, SETTINGS)
        config = load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.batch=64", "sbr.models=[SASRec, full]"])
        result.append(train_sbr(config, run, run / "data"))
    weights = [load_file(summary.version.path / "model.safetensors") for summary in result]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert result[0].metrics == result[1].metrics
    ranks = [pq.read_table(summary.version.path / "ranks.parquet") for summary in result]
    assert ranks[0].equals(ranks[1])
    items = [pq.read_table(summary.version.path / "items.parquet") for summary in result]
    assert items[1].select(items[0].column_names).equals(items[0])


# --- training


def test_hidden_is_what_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(0)
    begin, end = rng.integers(0, 60, 30), rng.integers(40, 100, 30)
    begin[:5], end[5:10] = ALWAYS, NEVER
    items = torch.tensor(sorted(rng.choice(30, 20, replace=False)))
    times, targets = torch.tensor(rng.integers(0, 100, 40)), items[torch.tensor(rng.integers(0, 20, 40))]
    targets[::7] = PAD
    candidates = Candidates(items, torch.zeros(20)).within((torch.tensor(begin), torch.tensor(end)))
    result = candidates.hidden(times, targets)
    assert result is not None
    for case in range(40):
        for place, item in enumerate(items.tolist()):
            open_ = begin[item] <= times[case] < end[item] or item == targets[case] or targets[case] == PAD
            assert bool(result[case, place]) == (not open_), (case, item)
    assert candidates.within(None).hidden(None, targets) is None and Candidates(items, torch.zeros(20)).hidden(times, targets) is None


def test_a_partition_with_some_hidden_is_the_logsumexp_of_the_others() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size, requires_grad=True) for size in ((6, 4), (9, 4), (9,))]
    plain = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    hidden = torch.rand(6, 9) < 0.5
    hidden[:, 0] = False
    weight = torch.randn(6)
    result = log_partition(tensors[0], tensors[1], tensors[2], hidden)
    wanted = (plain[0] @ plain[1].T + plain[2]).masked_fill(hidden, -torch.inf).logsumexp(1)
    torch.testing.assert_close(result, wanted)
    (result @ weight).backward()
    (wanted @ weight).backward()
    for ours, theirs in zip(tensors, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_loss_is_the_softmax_over_what_is_available() -> None:
    """As in `test_the_loss_is_the_softmax_of_the_scores`, with other negatives in each session, and two targets that were clicked although
    they were not available: whichever item of the session leads to one, it is one of those that it is held against."""
    with torch.no_grad():
        model = random_model()
        for _, pairs in model.pair_counts():
            pairs.counts.zero_()
            pairs.totals.zero_()
        model.counts[[40, 41]] *= 100  # likely enough to be missed
        rows = torch.tensor([[3, 7, 3, 9], [1, 2, 5, PAD]])
        targets = torch.tensor([[7, 3, 9, 41], [2, 5, 40, PAD]])
        times = torch.tensor([[10, 11, 12, 13], [25, 26, 27, 0]])
        begin, end = torch.full((ITEMS,), ALWAYS), torch.full((ITEMS,), NEVER)
        begin[20:30], end[30:40], begin[40:42] = 20, 20, 100
        candidates = everything(model.known).within((begin, end))
        tables, wanted = model.tables(), []
        scores = model.scores(rows, tables, targets != PAD)
        for line, target, time in zip(scores, targets[targets != PAD].tolist(), times[targets != PAD].tolist(), strict=True):
            allowed = [i for i in range(ITEMS - COLD) if begin[i] <= time < end[i] or i == target]
            assert len(allowed) < ITEMS - COLD
            wanted.append(float(line[allowed].logsumexp(0) - line[target]))
        assert torch.allclose(model.losses(rows, targets, tables, candidates, times), torch.tensor(wanted), atol=1e-4)


def test_an_item_is_no_negative_before_it_is_available(run: Path, inputs: TrainingData) -> None:
    """The id of an item that is a target of no case of a step, and not available in any of them, gets no gradient from the sum over the
    candidates."""
    windows = inputs.windows(20)[0]
    assert windows.times is not None
    model = build_model("ID-only", 0, SETTINGS, inputs)
    rows, targets, times = (torch.as_tensor(array[:8]).long() for array in (windows.inputs, windows.targets, windows.times))
    absent = [item for item in range(52) if item not in rows and item not in targets][:2]
    begin, end = torch.full((60,), ALWAYS), torch.full((60,), NEVER)
    begin[absent[0]], end[absent[1]] = int(times.max()) + 1, int(times[targets != PAD].min())
    for limits, none in ((None, False), ((begin, end), True)):
        model.zero_grad()
        candidates = everything(model.known).within(limits)
        model(rows, targets, model.known, candidates, torch.Generator(), times).sum().backward()
        assert isinstance(model, SessionModel) and model.ids.weight.grad is not None
        assert all(bool((model.ids.weight.grad[item] == 0).all()) == none for item in absent)


# --- evaluation


def brute_ranks(scores: np.ndarray, inputs: TrainingData, max_prefix: int = 20) -> list[float]:
    """Ranks of the test's targets in scores (cases, N), by plain loops over the items that could be clicked then."""
    windows, limits = inputs.windows(max_prefix)[2], inputs.available
    assert windows.times is not None and limits is not None
    case = windows.targets != PAD
    result = []
    for line, target, time in zip(scores, windows.targets[case].tolist(), windows.times[case].tolist(), strict=True):
        others = [i for i in range(60) if i != target and limits.begin[i] <= time < limits.end[i]]
        assert len(others) < 58
        result.append(1 + sum(line[i] > line[target] for i in others) + sum(line[i] == line[target] for i in others) / 2)
    return result


def test_what_is_not_available_is_not_ranked_above_a_target(run: Path, inputs: TrainingData) -> None:
    version = json.loads((run / "sbr" / "current").read_bytes())["version"]
    model, windows = load_model(run / "sbr" / version).eval(), inputs.windows(20)[2]
    prefixes, targets = prefixes_of(windows)
    with torch.inference_mode():
        tables = model.tables()
        scores = torch.cat([model.scores(torch.as_tensor(prefix[prefix != PAD][None]).long(), tables) for prefix in prefixes])
    ours = model_ranks(model, windows, available=inputs.available)
    assert ours.tolist() == brute_ranks(scores.numpy(), inputs)
    all_items = target_ranks(scores, torch.as_tensor(targets).long()).numpy()
    assert (ours <= all_items).all() and (ours < all_items).any()
    assert {58, 59} & {*targets.tolist()}  # which are available in 2100 and count all the same
    train = inputs.split.train
    for name in ("popularity", "co-occurrence", "SKNN"):
        score = build_baseline(name, train, 60)
        assert baseline_ranks(score, windows, available=inputs.available).tolist() == brute_ranks(score(prefixes), inputs), name
    table = pq.read_table(run / "sbr" / version / "ranks.parquet")
    assert table.num_rows == len(targets)


def test_what_is_not_available_is_not_counted_as_recommended(inputs: TrainingData) -> None:
    """Also where fewer items are left than a ranking has places."""
    begin = np.full(60, NEVER)
    begin[:5] = ALWAYS
    few = Availability(begin, np.full(60, NEVER))
    train, recommended = inputs.split.train, np.zeros(60, np.int64)
    windows = inputs.windows(20)[2]
    baseline_ranks(build_baseline("popularity", train, 60), windows, recommended, few)
    assert recommended[:5].tolist() == [windows.cases] * 5 or recommended[:5].min() > 0
    outside = {int(item) for item in np.flatnonzero(recommended) if item >= 5}
    assert outside <= {*windows.targets[windows.targets != PAD].tolist()}  # a target was clicked, so it stays


# --- recommending


def items_of(recommender: Recommender, at: int | None, session: list[str] | None = None) -> set[str]:
    return {item.item_id for item in recommender.recommend(["item-001", "item-052"] if session is None else session, 60, at=at).items}


def names(rows: set[int]) -> set[str]:
    return {f"item-{row:03d}" for row in rows}


BEFORE = {*range(52)}
AFTER = {*range(58)} - {3}
IN_2100 = {*range(60)} - {3}


@pytest.mark.parametrize(
    ("at", "rows"),
    [
        (GONE - 1, BEFORE),
        (GONE, BEFORE - {3}),
        (LAUNCH - 1, BEFORE - {3}),
        (LAUNCH, AFTER),
        (None, AFTER),
        (int(FUTURE.timestamp()), IN_2100),
        (int(END_OF_TIME.timestamp()), IN_2100 - {4}),
        (0, BEFORE),
    ],
)
def test_only_what_is_available_is_recommended(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch, at: int | None, rows: set[int]
) -> None:
    """Scored completely, in a batch, by popularity, and through the index; with times in any order."""
    assert items_of(recommender, at) == items_of(recommender, at, []) == names(rows)
    assert all(
        {item.item_id for item in result.items} == names(rows) for result in recommender.recommend_batch([["item-000"]] * 9, 60, at=at)
    )
    monkeypatch.setattr("recommender.serving.recommender.FULL_SCORING_ITEMS", 0)
    assert items_of(recommender, at) == names(rows)
    red = {row for row in rows if row % 4 == 0}
    assert {item.item_id for item in recommender.recommend(["item-001"], 60, filters={"colour": ["red"]}, at=at).items} == names(red)


Tpad = Callable[..., Result]


@pytest.fixture
def tpad(run: Path) -> Tpad:
    return lambda *words: CliRunner().invoke(cli.app, ["recommend", "--run", str(run), "-k", "60", *map(str, words)])


@pytest.mark.parametrize(
    ("at", "rows"),
    [
        (str(GONE), BEFORE - {3}),
        ("2020-09-17T05:20", AFTER),
        ("2020-09-17T07:20:00+02:00", AFTER),
        ("2020-09-17T07:19:59+02:00", BEFORE - {3}),
        ("2100-01-01", IN_2100),
        ("-1", BEFORE),
    ],
)
def test_the_time_is_given_in_iso_or_in_seconds(tpad: Tpad, at: str, rows: set[int]) -> None:
    assert datetime.fromtimestamp(LAUNCH, UTC).isoformat() == "2020-09-17T05:20:00+00:00"
    done = tpad("--session", "item-001", "--json", f"--at={at}")
    assert done.exit_code == 0, done.stderr
    assert {item["item_id"] for item in json.loads(done.stdout)["items"]} == names(rows)


@pytest.mark.parametrize("at", ["tomorrow", "", "2024-13-01", "1e9", "1234567890123", "2024-01-01T25:00", "nan"])
def test_what_is_no_time_is_refused(tpad: Tpad, at: str) -> None:
    done = tpad("--session", "item-001", f"--at={at}")
    assert done.exit_code == USAGE
    assert done.stderr == f"error: --at {at!r} is no time (command line); give e.g. 2026-11-30T12:00 or Unix seconds\n"


def test_a_file_of_sessions_is_answered_for_the_time(tpad: Tpad, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("session_id,item_id\na,item-001\na,item-002\nb,nothing\n")
    for at, rows in (([], AFTER), (["--at", GONE], BEFORE - {3}), (["--at", "2100-01-01"], IN_2100)):
        done = tpad("--sessions", tmp_path / "s.csv", "--out", tmp_path / "out.parquet", *at)
        assert done.exit_code == 0, done.stderr
        result = pq.read_table(tmp_path / "out.parquet").to_pylist()
        for session in ("a", "b"):
            assert {line["item_id"] for line in result if line["session_id"] == session} == names(rows)


def test_the_service_recommends_what_is_available_now(run: Path) -> None:
    with serving(run) as server:
        for session in (["item-001"], []):
            result = server.ask("/recommend", {"session": session, "k": 60}).json["items"]
            assert {item["item_id"] for item in result} == names(AFTER)
        many = server.ask("/recommend/batch", {"sessions": [["item-001"]] * 9, "k": 60}).json["answers"]
        assert all({item["item_id"] for item in answer["items"]} == names(AFTER) for answer in many)
        assert server.ask("/items/item-058").json["attributes"].keys() == {"colour", "tags"}


def test_nothing_available_is_one_line(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run / "data", other / "data")
    table = pq.read_table(other / "data" / "items.parquet").drop(["available_from", "available_until"])
    pq.write_table(table, other / "data" / "items.parquet")
    limit(other / "data", available_from=[1_577_836_800] * 60, available_until=[1_700_000_000] * 60)
    config = load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[ID-only]", "sbr.refit=false"])
    train_sbr(config, other, other / "data")
    for at, said in (
        ("2019-01-01", "2019-01-01T00:00:00+00:00"),
        ("-99999999999", "-99999999999"),
        ("999999999999", "999999999999"),
        (None, "20"),
    ):
        words = ["recommend", "--run", str(other), "--session", "item-001", *([] if at is None else [f"--at={at}"])]
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == USAGE, done.output
        assert done.stderr.startswith(f"error: no item is available at {said}") and done.stderr.count("\n") == 1
    done = CliRunner().invoke(cli.app, ["recommend", "--run", str(other), "--session", "item-001", "--at", "2021-01-01"])
    assert done.exit_code == 0
