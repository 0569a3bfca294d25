"""Logs the metrics of every distillation step to metrics.jsonl and to accelerate's trackers."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import environment_error, json_lines, replacing

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    """Writes `metrics.jsonl`, one line a step, and to any accelerate tracker; in the main process only.

    Losses are logged with their weights; bounds without, in nats, CLUB bounds in nats per dimension; held_out_... is of the probe.
    Trackers drop steps that go back, so they get the step plus `before`, the number of steps in the earlier phases.
    """

    def __init__(self, path: Path, accelerator: "Accelerator") -> None:
        self.path, self.accelerator, self.before = path, accelerator, 0

    def resume(self, phase: str, start: int) -> None:
        """Removes the lines of `phase` from step `start` on, which is about to be repeated."""
        if self.accelerator.is_main_process:
            rewrite_lines(self.path, lambda line: "phase" in line and not is_repeated(line, {"phase": phase}, start))

    def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
        """Logs the values of one step."""
        plain = {name: round(float(value), 6) for name, value in values.items()}
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "step": step} | plain) + "\n")
        self.accelerator.log({f"{phase}/{name}": value for name, value in plain.items()}, step=self.before + step)


def rewrite_lines(path: Path, keeps: Callable[[dict[str, Any]], bool]) -> None:
    """Replaces a log by its lines that `keeps`; without those that a kill or a flipped bit has damaged."""
    if not os.path.lexists(path):
        return
    try:
        lines = json_lines(path)
    except OSError as error:
        if environment_error(error, path) is not None:
            raise
        lines = []  # no file at all: a link to nowhere, a fifo
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines if keeps(line)), encoding="utf-8")


def is_repeated(line: dict[str, Any], entry: dict[str, Any], start: int) -> bool:
    """Returns whether a line is of `entry` and of a step that is about to be repeated, or of no step at all."""
    step = line.get("step")
    return all(line.get(key) == value for key, value in entry.items()) and not (isinstance(step, int) and step < start)


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, int | float | str | bool]:
    """Flattens nested settings to `distill.dim`: 64, ..., for trackers that know no sections."""
    settings: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{above}{key}.")
        else:
            settings[above + key] = value if isinstance(value, int | float | str) else str(value)
    return settings
