"""Writes the loss of every training step of the session models to metrics.jsonl."""

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.core.errors import USAGE, UserError
from pipeline.core.metrics_log import is_repeated, rewrite_lines

LOG_EVERY = 20  # steps whose losses are read from the device at a time: a read for every step would stall it


class Diverged(UserError):
    """Raised for a loss or score that is not finite."""


class LossLog:
    """Appends one line for each step, from the main process; on resuming, removes the lines of steps that will be repeated.

    Losses stay on the device until `write`, which sums the shares of the processes. Only there a loss that is not finite raises `Diverged`.
    """

    def __init__(self, path: Path, name: str, seed: int, start: int, steps: int, accelerator: Accelerator) -> None:
        self.path, self.step, self.steps, self.accelerator = path, start, steps, accelerator
        self.entry = {"stage": "sbr", "model": name, "seed": seed}
        self.waiting: list[Tensor] = []
        self.last = math.nan
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            rewrite_lines(path, lambda line: "model" in line and not is_repeated(line, self.entry, start))

    @property
    def due(self) -> bool:
        """Tells whether it is time to `write`."""
        return len(self.waiting) >= LOG_EVERY

    def add(self, part: Tensor) -> None:
        """Records the loss of the next step; `part` () is the share of this process."""
        self.waiting.append(part)

    def write(self) -> None:
        """Writes the recorded losses. Raises `Diverged` (2)."""
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
