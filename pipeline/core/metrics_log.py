"""Logs the metrics of every distillation step to metrics.jsonl and to accelerate's trackers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import replacing

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
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            earlier = [line for line in lines if (entry := _entry(line)) and not (entry["phase"] == phase and entry["step"] >= start)]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in earlier), encoding="utf-8")

    def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
        """Logs the values of one step."""
        plain = {name: round(float(value), 6) for name, value in values.items()}
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "step": step} | plain) + "\n")
        self.accelerator.log({f"{phase}/{name}": value for name, value in plain.items()}, step=self.before + step)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None  # a line cut short by a kill


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, int | float | str | bool]:
    """Flattens nested settings to `distill.dim`: 64, ..., for trackers that know no sections."""
    settings: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{above}{key}.")
        else:
            settings[above + key] = value if isinstance(value, int | float | str) else str(value)
    return settings
