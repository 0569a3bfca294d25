"""What every step of the distillation leaves in metrics.jsonl, and with the trackers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import replacing

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    """`metrics.jsonl`, one line a step, and any accelerate tracker. Written by the main process.

    Losses with their weights; bounds without, in nats, but CLUB bounds in nats a dimension; held_out_... is of the probe.
    Trackers are told of steps that never go back, or they would drop them: `before` are those of the phases that are over.
    """

    def __init__(self, path: Path, accelerator: "Accelerator") -> None:
        self.path, self.accelerator, self.before = path, accelerator, 0

    def resume(self, phase: str, start: int) -> None:
        """Forgets the steps of `phase` from `start` on: they are about to be done again."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if not ((entry := _entry(line)) is None or (entry["phase"] == phase and entry["step"] >= start))]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
        plain = {name: round(float(value), 6) for name, value in values.items()}
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "step": step} | plain) + "\n")
        self.accelerator.log({f"{phase}/{name}": value for name, value in plain.items()}, step=self.before + step)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None  # the line a kill cut short


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, int | float | str | bool]:
    """`distill.dim`: 64, ...: trackers know no sections."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value if isinstance(value, int | float | str) else str(value)
    return found
