"""metrics.jsonl of the session models' trainings: the loss of every step, fetched from the device a few steps at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.core.errors import USAGE, UserError

LOG_EVERY = 20  # steps whose losses are fetched from the device at once: asking for each would make it wait


class Diverged(UserError):
    """A loss that is no number."""


class LossLog:
    """metrics.jsonl: one line a step, of the main process; steps that are about to be done again are forgotten.

    Losses wait on the device, as each process has its part of them, until `write`: a loss that is no number is found there.
    """

    def __init__(self, path: Path, name: str, seed: int, start: int, steps: int, accelerator: Accelerator) -> None:
        self.path, self.step, self.steps, self.accelerator = path, start, steps, accelerator
        self.entry = {"stage": "sbr", "model": name, "seed": seed}
        self.waiting: list[Tensor] = []
        self.last = math.nan
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(path) if not self._again(line, start)]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _again(self, line: str, start: int) -> bool:
        try:
            entry = json.loads(line)
            return all(entry[k] == v for k, v in self.entry.items()) and entry["step"] >= start
        except (ValueError, KeyError, TypeError):
            return True  # the line a kill cut short

    @property
    def due(self) -> bool:
        return len(self.waiting) >= LOG_EVERY

    def add(self, part: Tensor) -> None:
        """`part`, (), is what this process adds to the loss of the step after the last one."""
        self.waiting.append(part)

    def write(self) -> None:
        losses = self.accelerator.reduce(torch.stack(self.waiting), "sum").tolist() if self.waiting else []
        begin, self.step, self.waiting = self.step, self.step + len(losses), []
        for step, self.last in enumerate(losses, begin):
            if not math.isfinite(self.last):
                epoch, number = divmod(step, self.steps)
                where = f"{self.entry['model']}, step {number} of epoch {epoch}"
                raise Diverged(f"loss is {self.last} ({where}); lower sbr.lr", USAGE)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                lines = (json.dumps(self.entry | {"step": step, "loss": round(loss, 6)}) for step, loss in enumerate(losses, begin))
                file.writelines(f"{line}\n" for line in lines)


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        yield from path.read_text(encoding="utf-8").splitlines()
