"""Tests checkpoints: training continues from the newest undamaged one only."""

import random
import resource
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from helpers.processes import FORK
from pipeline.core.checkpoint import Checkpoints, pack_optimizer, unpack_optimizer
from pipeline.core.errors import ARTIFACT, ENVIRONMENT, UserError


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 4), value), "half": torch.full((5,), value, dtype=torch.bfloat16), "step": torch.tensor(value)}


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def saved_steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_one_comes_back_exactly(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", "one")
    assert checkpoints.newest() is None
    state = {"epoch": 3, "best": 0.1 + 0.2, "phase": "align", "seen": [1, 2], "none": None}
    exact = {
        "odd": torch.randn(7, 5).T,
        "bf16": torch.randn(9).bfloat16(),
        "ids": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    checkpoints.save(100, tensors(1), {})
    checkpoints.save(200, exact, state)
    newest = Checkpoints(tmp_path / "run", "one").newest()
    assert newest is not None and newest[0] == 200 and newest[2] == state
    assert newest[1].keys() == exact.keys()
    for name, tensor in exact.items():
        assert newest[1][name].dtype == tensor.dtype and newest[1][name].shape == tensor.shape
        assert raw(newest[1][name]) == raw(tensor)


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    Checkpoints(tmp_path, "one").save(1, {"embed": tied, "head": tied, "row": tied[1]}, {})
    newest = Checkpoints(tmp_path, "one").newest()
    assert newest is not None
    assert torch.equal(newest[1]["embed"], tied) and torch.equal(newest[1]["head"], tied) and torch.equal(newest[1]["row"], tied[1])


def test_old_ones_are_pruned(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "one", keep=2)
    for step in (1, 5, 20, 1_000_000):
        checkpoints.save(step, tensors(step), {})
    assert saved_steps(tmp_path) == ["step-000020", "step-1000000"]
    checkpoints.clear()
    assert saved_steps(tmp_path) == [] and checkpoints.newest() is None


def test_every_bit_flip_and_truncation_falls_back_to_the_older_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, "one")
    checkpoints.save(100, tensors(1), {"epoch": 1})
    checkpoints.save(200, tensors(2), {"epoch": 2})
    draw = random.Random(0)
    for name in ("state.json", "tensors.safetensors"):
        path = tmp_path / "step-000200" / name
        good = path.read_bytes()
        flips = []
        for _ in range(100):
            flipped = bytearray(good)
            flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
            flips.append(bytes(flipped))
        for bad in [*flips, *(good[: draw.randrange(len(good))] for _ in range(25)), good + b"\n", None]:
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            newest = checkpoints.newest()
            assert (
                newest is not None
                and newest[0] == 100
                and newest[2] == {"epoch": 1}
                and torch.equal(newest[1]["weight"], tensors(1)["weight"])
            )
            warning = capsys.readouterr().err
            assert warning.startswith("warning: ") and "step-000200" in warning and warning.count("\n") == 1
            path.write_bytes(good)
    assert (checkpoints.newest() or [0])[0] == 200
    for step in (100, 200):
        (tmp_path / f"step-000{step}" / "state.json").unlink()
    assert checkpoints.newest() is None


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, "one")
    checkpoints.save(100, tensors(1), {})
    shutil.copytree(tmp_path / "step-000100", tmp_path / "step-000900")
    assert (checkpoints.newest() or [0])[0] == 100
    assert "step-000900" in capsys.readouterr().err


def test_going_on_from_the_older_one_replaces_the_damaged_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "one", keep=1)
    checkpoints.save(300, tensors(3), {})
    (tmp_path / "step-000300" / "state.json").write_text("{")
    checkpoints.save(200, tensors(2), {})
    assert saved_steps(tmp_path) == ["step-000200"]
    (tmp_path / "step-000200" / "tensors.safetensors").write_text("{")
    checkpoints.save(200, tensors(2), {"again": True})
    assert (checkpoints.newest() or [0, 0, 0])[2] == {"again": True}


def test_a_checkpoint_of_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "one").save(100, tensors(1), {})
    with pytest.raises(UserError, match=r"belongs to other settings or data .*--fresh") as caught:
        Checkpoints(tmp_path, "two").newest()
    assert caught.value.code == ARTIFACT
    assert not Checkpoints(tmp_path, "one").drop_others()
    assert (Checkpoints(tmp_path, "one").newest() or [0])[0] == 100


def test_those_of_other_settings_can_be_dropped(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "one").save(100, tensors(1), {})
    Checkpoints(tmp_path, "two").save(200, tensors(2), {})
    assert Checkpoints(tmp_path, "one").drop_others()
    assert saved_steps(tmp_path) == ["step-000100"]


@pytest.mark.parametrize("state", [{1: "int key"}, {"betas": (0.9, 0.999)}, {"loss": float("nan")}, {"path": Path("x")}])
def test_a_state_that_json_would_change_is_not_saved(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Checkpoints(tmp_path, "one").save(1, {}, state)
    assert saved_steps(tmp_path) == []


def save_forever(folder: Path, limit: int | None) -> None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpoints = Checkpoints(folder, "one")
    step = (checkpoints.newest() or [0])[0]
    try:
        while True:
            step += 1
            checkpoints.save(step, {"weight": torch.full((40_000,), float(step))}, {"step": step})
    except UserError as error:
        (folder.parent / "error").write_text(str(error))
        sys.exit(error.code)


def saver(folder: Path, limit: int | None = None) -> BaseProcess:
    # from a server without threads: a fork of this process could wait for ever for a thread of torch that it does not have
    process = FORK.Process(target=save_forever, args=(folder, limit))
    process.start()
    return process


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reached = 0
    for kill in range(10):
        process = saver(tmp_path)
        end = time.monotonic() + 20
        while not any(s >= f"step-{reached + 3:06d}" for s in saved_steps(tmp_path)) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(random.Random(kill).random() * 0.01)
        process.kill()
        process.join()
        newest = Checkpoints(tmp_path, "one").newest()
        assert newest is not None and newest[0] > reached
        reached = newest[0]
        assert newest[2] == {"step": reached} and torch.equal(newest[1]["weight"], torch.full((40_000,), float(reached)))
    Checkpoints(tmp_path, "one").save(reached + 1, {}, {})
    assert len(saved_steps(tmp_path)) == 2, "leftovers of the killed writers"
    assert "warning" not in capfd.readouterr().err


def test_a_disk_that_takes_no_more_is_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run", "one").save(7, tensors(7), {})
    process = saver(tmp_path / "run", limit=65536)
    process.join(20)
    assert process.exitcode == ENVIRONMENT
    assert (tmp_path / "error").read_text().startswith(f"file too large ({tmp_path / 'run'}")
    assert saved_steps(tmp_path / "run") == ["step-000007"]
    assert (Checkpoints(tmp_path / "run", "one").newest() or [0])[0] == 7


# ---------------------------------------------------------------- optimizers


def build(kind: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3), torch.nn.Linear(3, 3))
    model[3].requires_grad_(False)  # never gets a gradient: no optimizer state
    if kind == "bfloat16":
        model.bfloat16()
    decayed, plain = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), amsgrad=kind == "amsgrad")
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "bfloat16", "sgd"])
def test_training_resumed_from_a_checkpoint_ends_bit_for_bit_the_same(tmp_path: Path, kind: str) -> None:
    model, optimizer, schedule = build(kind)
    names = [f"p{n}" for n in range(6)]
    train(model, optimizer, schedule, range(7))
    packed, state = pack_optimizer(optimizer, names)
    weights = {f"model/{k}": v for k, v in model.state_dict().items()}
    Checkpoints(tmp_path, kind).save(7, weights | packed, {"optimizer": state, "schedule_step": schedule.last_epoch})
    train(model, optimizer, schedule, range(7, 15))

    resumed, again, later = build(kind)
    newest = Checkpoints(tmp_path, kind).newest()
    assert newest is not None
    _, loaded, state = newest
    resumed.load_state_dict({k.removeprefix("model/"): v for k, v in loaded.items() if k.startswith("model/")})
    unpack_optimizer(again, names, loaded, state["optimizer"])
    later.last_epoch = state["schedule_step"]
    train(resumed, again, later, range(7, 15))

    for (name, one), two in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    straight, _ = pack_optimizer(optimizer, names)
    other, _ = pack_optimizer(again, names)
    assert straight.keys() == other.keys() and len(straight) > 0
    assert all(torch.equal(straight[k], other[k]) and straight[k].dtype == other[k].dtype for k in straight)
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert again.param_groups[0].get("betas") == optimizer.param_groups[0].get("betas")


def test_full_precision_state_of_half_precision_weights_stays_full(tmp_path: Path) -> None:
    model, optimizer, schedule = build("bfloat16")
    train(model, optimizer, schedule, range(2))
    for slots in optimizer.state.values():
        slots["exp_avg"] = torch.full_like(slots["exp_avg"], 1 / 3, dtype=torch.float32)
    names = [f"p{n}" for n in range(6)]
    packed, state = pack_optimizer(optimizer, names)
    _, other, _ = build("bfloat16")
    unpack_optimizer(other, names, packed, state)
    assert all(torch.equal(value, pack_optimizer(other, names)[0][name]) for name, value in packed.items())


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    _, optimizer, _ = build("adamw")
    with pytest.raises(ValueError, match="names"):
        pack_optimizer(optimizer, ["one", "two"])
    packed, state = pack_optimizer(optimizer, [f"p{n}" for n in range(6)])
    with pytest.raises(ValueError, match="other parameters"):
        unpack_optimizer(optimizer, [f"q{n}" for n in range(6)], packed, state)
