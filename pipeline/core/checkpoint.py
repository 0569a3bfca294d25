"""Saves and resumes a training. A checkpoint is complete or absent, and the newest valid one is used.

A checkpoint is a folder `step-000100/` with `tensors.safetensors` and, written last, `state.json`, which holds the
sha256 of the tensors and of itself. No pickle. The files do not depend on the number of devices: the main process saves,
every process may load.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.core.artifact import decoding
from pipeline.core.errors import ARTIFACT, UserError, note
from pipeline.core.files import canonical_json, environment_error, fsync_path, read_sealed, remove, sha256_file, write_sealed

TENSORS, STATE = "tensors.safetensors", "state.json"
SAVE_SECONDS = 120.0  # between two checkpoints of a long stretch
STEP_NAME = re.compile(r"step-(\d{6,})")


class Damaged(Exception):
    """A checkpoint differs from what was saved."""


class Checkpoints:
    """The checkpoints of one training run in `folder`. `fingerprint` identifies the settings and data they belong to."""

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError("keep < 1")
        self.folder = folder
        self.fingerprint = fingerprint
        self.keep = keep

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Adds a checkpoint and prunes to `keep`; also removes those of later steps, which a restarted run has left behind.

        `state` must survive a round trip through JSON: string keys, lists instead of tuples, no NaN. Raises `UserError` (5).
        """
        if json.loads(canonical_json(state)) != state:
            raise TypeError("the state of a checkpoint must be plain JSON: string keys, lists instead of tuples")
        temporary, target = self.folder / f".step-{step:06d}.tmp", self.folder / f"step-{step:06d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tidy()
            temporary.mkdir()
            self._write(temporary, step, tensors, state)
            remove(target)  # a damaged one, or one of a run that was started over
            os.rename(temporary, target)
            fsync_path(self.folder)
            earlier = [n for n in self._steps() if n <= step][: self.keep]
            for number in set(self._steps()) - set(earlier):
                remove(self.folder / f"step-{number:06d}")
        except (OSError, SafetensorError) as error:
            if (line := environment_error(error, self.folder)) is None:
                raise
            raise line from error
        finally:
            remove(temporary)

    def newest(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Returns (step, tensors on the CPU, state) of the newest valid checkpoint, or None. Raises `UserError` (4).

        A damaged checkpoint is skipped with a warning; one of other settings or data is an error.
        """
        for step in self._steps():
            path = self.folder / f"step-{step:06d}"
            try:
                entry = _read_state(path, step)
                tensors = _read_tensors(path, entry)
                if entry["fingerprint"] != self.fingerprint:
                    raise UserError(
                        f"checkpoint belongs to other settings or data ({path}); start over with --fresh, or use another --run", ARTIFACT
                    )
                return step, tensors, entry["state"]
            except Damaged as reason:
                note(f"warning: checkpoint is damaged and left out: {reason} ({path})")
        return None

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """Turns what a checkpoint with right sums and wrong content makes its reader raise into `UserError` (4)."""
        with decoding(self.folder, "start over with --fresh"):
            yield

    def take_over(self, folder: Path, step: int) -> bool:
        """Links the checkpoint of `step` of another run into this one, if it has the same settings and data; returns whether it did."""
        name = f"step-{step:06d}"
        temporary = self.folder / f".{name}.tmp"
        try:
            if (self.folder / name).exists() or _read_state(folder / name, step)["fingerprint"] != self.fingerprint:
                return False
            remove(temporary)
            temporary.mkdir(parents=True)
            for file in (TENSORS, STATE):
                os.link(folder / name / file, temporary / file)  # checkpoints never change, so two folders may share one
            fsync_path(temporary)
            os.rename(temporary, self.folder / name)
            fsync_path(self.folder)
        except (Damaged, OSError):  # it was removed meanwhile, or is on another disk: then it is computed again
            remove(temporary)
            return False
        return True

    def drop_others(self) -> bool:
        """Removes the checkpoints of other settings or data; returns whether there were any."""
        others = [step for step in self._steps() if self._is_other(step)]
        for step in others:
            remove(self.folder / f"step-{step:06d}")
        return bool(others)

    def _is_other(self, step: int) -> bool:
        try:
            return bool(_read_state(self.folder / f"step-{step:06d}", step)["fingerprint"] != self.fingerprint)
        except Damaged:  # `newest` reports it
            return False

    def tidy(self) -> None:
        """Removes what a writer left that was killed while it saved or pruned."""
        if self.folder.is_dir():
            for leftover in [*self.folder.glob(".step-*.tmp"), *(self.folder / f"step-{n:06d}" for n in self._steps()[self.keep :])]:
                remove(leftover)

    def clear(self) -> None:
        """Removes every checkpoint, of any settings."""
        for step in self._steps():
            remove(self.folder / f"step-{step:06d}")

    def _steps(self) -> list[int]:
        """Returns the steps that have checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((int(m[1]) for p in self.folder.iterdir() if (m := STEP_NAME.fullmatch(p.name))), reverse=True)

    def _write(self, folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        save_file(_separate(tensors), folder / TENSORS)
        fsync_path(folder / TENSORS)
        entry = {"step": step, "fingerprint": self.fingerprint, "tensors_sha256": sha256_file(folder / TENSORS), "state": state}
        write_sealed(folder / STATE, entry)


def seconds_of(folder: Path) -> float:
    """Returns the seconds of training up to the newest checkpoint in `folder`, without interruptions."""
    for step in Checkpoints(folder, "")._steps():
        with suppress(Damaged):
            return float(_read_state(folder / f"step-{step:06d}", step)["state"].get("seconds", 0.0))
    return 0.0


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns contiguous CPU tensors; copies those that share memory (tied weights), as safetensors requires."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return separate


def _read_state(path: Path, step: int) -> dict[str, Any]:
    try:
        entry = read_sealed(path / STATE)
    except OSError as error:
        raise _unread(error, path / STATE) from None
    except ValueError:
        raise Damaged(f"{STATE} is not as written") from None
    if not isinstance(entry, dict) or entry.get("step") != step or not {"fingerprint", "state"} <= entry.keys():
        raise Damaged(f"{STATE} is not as written")
    return entry


def _read_tensors(path: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        if sha256_file(path / TENSORS) != entry.get("tensors_sha256"):
            raise Damaged(f"{TENSORS} is not as written")
        return dict(load_file(path / TENSORS))
    except OSError as error:
        raise _unread(error, path / TENSORS) from None
    except SafetensorError as error:  # right sums, and no tensors
        raise Damaged(f"{TENSORS}: {error}") from None


def _unread(error: OSError, path: Path) -> Exception:
    """Returns what to raise where a file of a checkpoint cannot be read: an error of the disk, or damage."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or error.errno == errno.EINVAL
    return (None if missing else environment_error(error, path)) or Damaged(f"{path.name} is missing or no plain file")


# ---------------------------------------------------------------- optimizers


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Packs an optimizer's state into flat named tensors and JSON. `names`: of its parameters, in its order.

    For optimizers whose state is tensors and numbers per parameter (AdamW, SGD, ...).
    """
    packed = optimizer.state_dict()
    count = sum(len(group["params"]) for group in packed["param_groups"])
    if len(set(names)) != count or len(names) != count:
        raise ValueError(f"{len(names)} names, some equal perhaps, for {count} parameters")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {name: {} for name in names}  # slot -> its number; None: a tensor
    for index, slots in packed["state"].items():
        for slot, value in slots.items():
            values[names[index]][slot] = None if isinstance(value, torch.Tensor) else value
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{names[index]}/{slot}"] = value
    groups = [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in packed["param_groups"]]
    return tensors, {"groups": groups, "values": values}


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Restores the state of `pack_optimizer` into an optimizer over the same parameters, bit for bit."""
    if state["values"].keys() != set(names) or len(state["groups"]) != len(optimizer.param_groups):
        raise ValueError("the packed optimizer has other parameters or groups")
    saved = ({s: tensors[f"optimizer/{name}/{s}"].clone() if v is None else v for s, v in state["values"][name].items()} for name in names)
    slots = {index: values for index, values in enumerate(saved) if values}
    groups = [
        {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in packed.items()}
        for group, packed in zip(optimizer.param_groups, state["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in slots.items():  # load_state_dict casts to the parameter's type
        loaded = optimizer.state[parameters[index]]
        for slot, value in values.items():
            if isinstance(value, torch.Tensor) and loaded[slot].dtype != value.dtype:
                loaded[slot] = value.to(loaded[slot].device)
