"""`distill` on a small shop: it learns, a kill costs nothing, only training sessions count, and processes share the work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from typer.testing import CliRunner

import cli
from helpers.backbones import save_backbone
from helpers.processes import kill_when, start, two_processes
from helpers.runs import (
    PHASES,
    SETTINGS,
    STEPS,
    change_items,
    distill_run,
    export_run,
    launched,
    losses,
    published_folder,
    same,
    settings,
    weights,
)
from pipeline.core.artifact import locked
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.errors import ARTIFACT, DATA, ENVIRONMENT, USAGE, UserError
from pipeline.core.files import read_sealed
from pipeline.core.prefetch import loaded_ahead, telling_of_dead_workers
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from pipeline.distill.distill import check_batches
from pipeline.distill.phases import Align, drawn, first_of_each

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def options(*more: str) -> list[str]:
    return [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]


def tpad(*words: str) -> tuple[int, str]:
    """Exit code and stderr of a command, in this process."""
    done = CliRunner().invoke(cli.app, list(words))
    return done.exit_code, done.stderr


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def without_align(run: Path, to: Path) -> Path:
    """A copy in which the last phase is still to be done."""
    copy(run, to)
    shutil.rmtree(to / "distill" / "align")
    shutil.rmtree(to / "mllm")
    return to


SMILE = "distill.align.bound=smile"
OPTIONS = (SMILE, "distill.align.token_distill=0.5")  # of the last phase, all at once


@pytest.fixture(scope="module")
def options_run(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = without_align(tiny_run, tmp_path_factory.mktemp("options") / "run")
    distill_run(run, tiny_data, *OPTIONS)
    return run


# --- learning


def test_every_loss_is_finite_and_falls(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = 40
    distill_run(
        tmp_path, tiny_data, *(f"distill.{phase}.{setting}" for phase in PHASES for setting in (f"steps={steps}", "lr=3e-3", "batch=16"))
    )
    found = losses(tmp_path)
    assert list(found) == [(phase, step) for phase in PHASES for step in range(steps)]
    assert np.isfinite([value for line in found.values() for value in line.values()]).all()
    fall = {
        "knowledge": ("loss", "generation", "view"),
        "transfer": ("loss", "retrieval", "generation", "tie"),
        "align": ("loss", "align", "relation", "generation"),
    }
    for phase, names in fall.items():
        for name in names:
            early, late = (np.mean([found[phase, step][name] for step in of]) for of in (range(8), range(steps - 8, steps)))
            assert late < early, f"{name} of {phase}: {early} -> {late}"
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_heads_of_a_published_backbone_start_where_items_differ(tiny_data: Path, tmp_path: Path, pooling: str) -> None:
    """What is withheld from a view outweighs, in its states, what the item is: a loss far above that of features which are all
    equal, log N, is soonest lowered by making them so."""
    words = [f"backbone.name={save_backbone(tmp_path / 'smolvlm', 'smolvlm')}", "backbone.lora.rank=2", f"backbone.pooling={pooling}"]
    words += ["distill.knowledge.batch=16", *(f"distill.{phase}.steps={n}" for phase, n in zip(PHASES, (8, 1, 1), strict=True))]
    distill_run(tmp_path / "run", tiny_data, *words)
    view = losses(tmp_path / "run")["knowledge", 0]["view"] / settings().distill.knowledge.view
    assert view < np.log(16) / 2


def test_features_that_hardly_differ_are_told_of(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = range(pq.read_metadata(tiny_data / "items.parquet").num_rows)
    equal = change_items(tiny_data, tmp_path / "equal", dict.fromkeys(rows), dict.fromkeys(rows, "a mug"))
    distill_run(tmp_path / "run", equal)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[2] for line in warned] == ["knowledge", "transition"]


def test_an_epoch_takes_every_item_once() -> None:
    taken = np.concatenate([drawn(50, 8, step, 0, 1) for step in range(25)])
    for epoch in range(4):
        assert sorted(taken[epoch * 50 : (epoch + 1) * 50]) == list(range(50))
    assert list(taken[:50]) != list(taken[50:100])


def with_sessions(data: Path, to: Path, more: list[list[str]], only: bool = False) -> Path:
    """The data folder with sessions added at its beginning, or with these alone."""
    shutil.copytree(data, to)
    table = pq.read_table(to / "sessions.parquet")
    early = [(f"first-{n}", item, n * 10 + k) for n, items in enumerate(more) for k, item in enumerate(items)]
    columns = {name: list(column) for name, column in zip(("session_id", "item_id", "timestamp"), zip(*early, strict=True), strict=True)}
    added = pa.table({name: pa.array(columns[name], table.schema.field(name).type) for name in table.column_names})
    pq.write_table(added if only else pa.concat_tables([added, table]), to / "sessions.parquet")
    return to


def test_an_item_that_only_repeats_is_learned_from_without_stumbling(tiny_data: Path, tmp_path: Path) -> None:
    """It has no transition to another item, but a session prompt asks for it."""
    items = pq.read_table(tiny_data / "items.parquet")["item_id"].to_pylist()
    sold = set(pq.read_table(tiny_data / "sessions.parquet")["item_id"].to_pylist())
    lonely = next((item for item in items if item not in sold), items[0])
    data = with_sessions(tiny_data, tmp_path / "data", [[lonely] * 3] * 30)
    distill_run(tmp_path / "run", data, "distill.transfer.sessions=16", "distill.transfer.steps=20")
    assert np.isfinite([line["sessions"] for (phase, _), line in losses(tmp_path / "run").items() if phase == "transfer"]).all()


def test_a_log_without_two_different_items_is_one_clear_line(tiny_data: Path, tmp_path: Path) -> None:
    items = pq.read_table(tiny_data / "items.parquet")["item_id"].to_pylist()
    data = with_sessions(tiny_data, tmp_path / "data", [[item] * 2 for item in items], only=True)
    with pytest.raises(UserError, match="no training session has two different items") as error:
        distill_run(tmp_path / "run", data)
    assert error.value.code == DATA


def test_batches_of_one_do(tiny_data: Path, tmp_path: Path) -> None:
    """One item has no other to be told from: nothing to learn there, and nothing to stumble over."""
    distill_run(tmp_path, tiny_data, *(f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=4", "batch=1")))
    found = losses(tmp_path)
    assert len(found) == 12
    assert np.isfinite([value for line in found.values() for value in line.values()]).all()


def test_a_loss_that_leaves_the_numbers_is_one_clear_line(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.knowledge\.lr") as error:
        distill_run(tmp_path, tiny_data, "distill.knowledge.lr=1e30")
    assert error.value.code == USAGE
    assert not (tmp_path / "mllm" / "current").exists()


def test_trackers_are_told_of_steps_that_go_on_over_the_phases(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: told.append((next(iter(values)).split("/")[0], step)))
    distill_run(tmp_path, tiny_data, *(f"distill.{phase}.steps=2" for phase in PHASES))
    assert told == [(phase, 2 * n + step) for n, phase in enumerate(PHASES) for step in (0, 1)]
    assert list(losses(tmp_path)) == [(phase, step) for phase in PHASES for step in (0, 1)]


# --- bounds


def test_bounds_are_probed_on_items_outside_the_batch(tiny_run: Path, options_run: Path) -> None:
    for run in (tiny_run, options_run):
        probed = {key: {name for name in line if name.startswith("held_out_")} for key, line in losses(run).items()}
        expected = {"knowledge": set(), "transfer": {"held_out_club_bound"}, "align": {"held_out_club_bound", "held_out_info_nce"}}
        assert probed == {(phase, step): expected[phase] if step % 3 == 2 else set() for phase in PHASES for step in range(STEPS)}
    phase = Align(settings("distill.probe.items=20"), range(40), None, None, None, {})
    one, two = (phase.unseen({"rows": torch.arange(first, first + 10)}) for first in (0, 20))
    assert len(set(one)) == len(set(two)) == 20
    assert not set(one) & set(range(10))
    assert not set(two) & set(range(20, 30))
    assert len(set(one) & set(two)) >= 10  # the same items but for the batches'


def test_the_probe_leaves_training_alone(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    distill_run(without_align(tiny_run, tmp_path / "run"), tiny_data, "distill.probe.every=0")
    assert same(weights(tmp_path / "run"), weights(tiny_run))


def test_smile_aligns_too(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = without_align(tiny_run, tmp_path / "run")
    distill_run(run, tiny_data, SMILE, "distill.align.steps=60", "distill.align.lr=3e-3", "distill.align.batch=32")
    found = losses(run)
    early, late = (np.mean([found["align", step]["smile_bound"] for step in of]) for of in (range(8), range(52, 60)))
    assert late > early + 1
    assert found["align", 59]["held_out_info_nce"] > 1  # nats, of at most log 8: the batch leaves eight items


def test_what_t_writes_is_followed_token_by_token(tiny_run: Path, options_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert not any("token_distill" in line for line in losses(tiny_run).values())
    assert all("token_distill" in line for (phase, _), line in losses(options_run).items() if phase == "align")
    # a T that has learned nothing is K, of which the model departs for the other losses' sake, and less so if it is held to T
    begun = tmp_path / "begun"
    untaught, found = ("distill.transfer.steps=0", "distill.align.steps=30"), {}
    for weight in ("0.01", "10"):
        run = copy(begun, tmp_path / weight) if begun.exists() else begun
        if run != begun:
            shutil.rmtree(run / "distill" / "align")
            shutil.rmtree(run / "mllm")
        distill_run(run, tiny_data, *untaught, f"distill.align.token_distill={weight}")
        found[weight] = [line["token_distill"] / float(weight) for (phase, _), line in losses(run).items() if phase == "align"]
    assert found["10"][0] == pytest.approx(0, abs=1e-6)
    assert 0 < np.mean(found["10"][10:]) < np.mean(found["0.01"][10:])


# --- stopping and starting


def test_killed_in_every_phase_it_ends_with_the_weights_of_an_undisturbed_run(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    for phase in PHASES:
        process = start(distill_run, tmp_path, tiny_data)
        kill_when(process, (tmp_path / "distill" / phase / "step-000002" / "state.json").exists)
        assert not (tmp_path / "distill" / phase / f"step-{STEPS:06d}").exists()  # so it was killed inside this phase
    assert not (tmp_path / "mllm" / "current").exists()
    assert distill_run(tmp_path, tiny_data)
    assert same(weights(tmp_path), weights(tiny_run))
    assert losses(tmp_path) == losses(tiny_run)


def test_killed_with_a_learned_critic_and_a_teacher_it_goes_on_with_those_it_had(
    options_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = without_align(options_run, tmp_path / "run")
    kill_when(start(distill_run, run, tiny_data, *OPTIONS), (run / "distill" / "align" / "step-000002" / "state.json").exists)
    assert distill_run(run, tiny_data, *OPTIONS)
    assert same(weights(run), weights(options_run))
    assert losses(run) == losses(options_run)


def test_a_table_of_features_is_made_once_and_goes_on_where_it_was(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = without_align(tiny_run, tmp_path / "run")
    folder = run / "distill" / "transfer" / "table"
    (whole,) = folder.iterdir()
    state = read_sealed(whole / "state.json")
    features = load_file(whole / "tensors.safetensors")["transition"]
    shutil.rmtree(whole)
    Checkpoints(folder, state["fingerprint"]).save(10, {"transition": features[:10]}, {})
    capsys.readouterr()
    assert distill_run(run, tiny_data)
    told = capsys.readouterr().err
    assert "knowledge table" not in told
    assert f"transition table: {len(features)}/{len(features)}" in told
    assert [path.name for path in folder.iterdir()] == [whole.name]
    again = load_file(whole / "tensors.safetensors")["transition"]
    assert torch.equal(again[:10], features[:10])
    assert torch.allclose(again, features, atol=1e-5)  # in other batches


def test_asked_to_stop_it_saves_and_exits_143_and_goes_on_later(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["distill", "--run", str(run), "--data", str(tiny_data), *options("distill.checkpoint_every=1000")]
    process = subprocess.Popen([sys.executable, "-m", "cli", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = run / "distill" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    assert out == ""
    assert "Traceback" not in err
    stopped = [p.name for p in (run / "distill" / "knowledge").glob("step-*")]
    assert len(stopped) == 1
    assert 0 < int(stopped[0].removeprefix("step-")) < STEPS
    code, err = tpad(*command)
    assert code == 0, err
    assert "next: tpad export-embeddings" in err
    assert same(weights(run), weights(tiny_run))


def test_a_second_run_is_up_to_date_and_other_settings_are_refused(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = copy(tiny_run, tmp_path / "run")
    begin = ["distill", "--run", str(run), "--data", str(tiny_data)]
    before = (run / "mllm" / "current").read_bytes()
    code, err = tpad(*begin, *options())
    assert code == 0
    assert "up to date" in err
    for changed in ("distill.knowledge.view=0.25", "distill.align.relation=0.5"):
        code, err = tpad(*begin, *options(changed))
        assert code == ARTIFACT
        assert err.splitlines()[-1].startswith("error: checkpoint belongs to other settings or data")
        assert "--fresh" in err.splitlines()[-1]
    assert (run / "mllm" / "current").read_bytes() == before
    assert same(weights(run), weights(tiny_run))
    code, err = tpad(*begin, "--fresh", *options("distill.align.relation=0.5"))
    assert code == 0, err
    assert published_folder(run, "mllm").name == "v0002"
    assert not same(weights(run), weights(tiny_run))


def test_fresh_gives_the_same_weights_again(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = copy(tiny_run, tmp_path / "run")
    assert tpad("distill", "--fresh", "--run", str(run), "--data", str(tiny_data), *options())[0] == 0
    assert published_folder(run, "mllm").name == "v0002"
    assert same(weights(run), weights(tiny_run))
    assert losses(run) == losses(tiny_run)


# --- what is read


def other_items(data: Path, to: Path, change: Callable[[str], bool]) -> Path:
    """The data folder with other items in the sessions whose session_id `change` picks."""
    shutil.copytree(data, to)
    table = pq.read_table(to / "sessions.parquet")
    events = zip(table["session_id"].to_pylist(), table["item_id"].to_pylist(), strict=True)
    items = [f"p{39 - int(item[1:]):04d}" if change(session) else item for session, item in events]
    pq.write_table(table.set_column(table.schema.get_field_index("item_id"), "item_id", pa.array(items)), to / "sessions.parquet")
    return to


def held_out(data: Path) -> set[str]:
    split = split_sessions(load_sessions(data, load_catalog(data)), Config().data)
    return {*split.valid.session_ids, *split.test.session_ids}


def test_held_out_sessions_are_never_read(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    late = held_out(tiny_data)
    changed = other_items(tiny_data, tmp_path / "late", lambda session: session in late)
    distill_run(tmp_path / "run", changed)
    assert same(weights(tmp_path / "run"), weights(tiny_run))


def test_other_training_sessions_under_the_same_ids_are_other_data(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    late = held_out(tiny_data)
    changed = other_items(tiny_data, tmp_path / "early", lambda session: session not in late)
    run = copy(tiny_run, tmp_path / "run")
    with pytest.raises(UserError, match="other settings or data") as error:
        distill_run(run, changed)
    assert error.value.code == ARTIFACT
    distill_run(tmp_path / "new", changed)
    one, two = weights(tmp_path / "new"), weights(tiny_run)
    assert any(not torch.equal(one[name], two[name]) for name in one)


# --- processes


@pytest.mark.parametrize("more", [(), OPTIONS])
def test_two_processes_take_the_steps_of_one(
    tiny_run: Path, options_run: Path, tiny_data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    alone, run = tiny_run, tmp_path / "run"
    if more:
        alone, run = options_run, without_align(options_run, run)
        two_processes(distill_run, run, tiny_data, *more)
    else:
        launched("ddp.yaml", run, tiny_data)
    one, two = losses(alone), losses(run)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].keys() == two[key].keys()
        assert all(abs(one[key][name] - two[key][name]) < 1e-3 for name in one[key]), key
    # summed in another order, so not the same bits: two processes did share the work
    assert not same(weights(run), weights(alone))
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], weight, atol=2e-3, rtol=0)


def test_two_processes_export_what_one_does(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "mllm", tmp_path / "mllm")
    two_processes(export_run, tmp_path, tiny_data)
    one, two = read_embeddings(tiny_run / "embeddings"), read_embeddings(tmp_path / "embeddings")
    assert one.item_ids == two.item_ids
    for half in ("knowledge", "transition"):
        np.testing.assert_allclose(getattr(one, half), getattr(two, half), atol=1e-5)
    assert len(two.version.manifest["parts"]) == 3  # so both had some


def test_a_bad_picture_is_one_clear_line_from_a_worker_too(tiny_data: Path, tmp_path: Path) -> None:
    data = change_items(tiny_data, tmp_path / "data", dict.fromkeys(range(40), b"no picture"), {})
    with pytest.raises(UserError, match="image cannot be used") as error:
        distill_run(tmp_path / "run", data, "distill.workers=1")
    assert error.value.code == DATA
    assert str(error.value).count("\n") == 0


def killed_at_one(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # as a system does that runs out of memory
    return number


@pytest.mark.parametrize("work", [0.0, 0.3])
def test_a_worker_that_dies_is_one_clear_line(work: float) -> None:
    """Whether the loop waits for it at that moment or has something else in hand."""
    with pytest.raises(UserError, match=r"a worker process died.*distill\.workers") as error, telling_of_dead_workers():
        for _ in loaded_ahead(killed_at_one, range(3), 1):
            time.sleep(work)
    assert error.value.code == ENVIRONMENT


def test_workers_change_no_weight(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    distill_run(tmp_path, tiny_data, "distill.workers=2")
    assert same(weights(tmp_path), weights(tiny_run))


def test_two_at_once_on_one_run_are_refused(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.distill.distill.LOCK_SECONDS", 0.1)
    with locked(tmp_path / "distill"), pytest.raises(UserError, match="another tpad is writing here"):
        distill_run(tmp_path, tiny_data)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("distill.log_with=[tensorboards]", "no tracker `tensorboards` (distill.log_with)"),
        ("data.text=[title, stile]", "no column `stile` in items.parquet (data.text)"),
        ("backbone.attention=flash_attention_2", "(backbone.attention)"),
    ],
)
def test_what_is_not_there_is_named_before_the_training(tiny_data: Path, tmp_path: Path, setting: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        distill_run(tmp_path, tiny_data, setting)
    assert says in str(error.value)


def in_mixed_precision(run: Path, data: Path) -> None:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` hands it on
    with pytest.raises(UserError, match=r"no training in bf16 .* backbone\.dtype"):
        distill_run(run, data)


def test_a_launcher_does_not_change_what_is_computed_in(tiny_data: Path, tmp_path: Path) -> None:
    process = start(in_mixed_precision, tmp_path, tiny_data)
    process.join()
    assert process.exitcode == 0


def test_an_item_twice_in_a_batch_is_no_negative_of_itself(tiny_data: Path, tmp_path: Path) -> None:
    """A batch larger than the catalogue: each item counts once where items are told apart."""
    assert first_of_each(np.array([3, 1, 3, 3, 0, 1])).tolist() == [True, True, False, False, True, False]
    distill_run(
        tmp_path, tiny_data, "distill.align.batch=88", "distill.align.steps=3", "distill.knowledge.steps=1", "distill.transfer.steps=1"
    )
    assert all(np.isfinite(list(line.values())).all() for (phase, _), line in losses(tmp_path).items() if phase == "align")


def test_a_batch_that_does_not_divide_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"distill\.transfer\.sessions") as error:
        check_batches(settings("distill.transfer.sessions=7"), 2)
    assert error.value.code == USAGE
