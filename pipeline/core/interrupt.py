"""Stops a training on Ctrl-C or SIGTERM after the current step, at the same step in every process."""

import signal
from typing import Any

import torch


class Interrupt:
    """Catches Ctrl-C and SIGTERM in a `with` block: the first asks for a stop after the current step, a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self._before[number])

    def agreed(self, accelerator: Any) -> bool:
        """Returns whether any process was asked to stop, since all must stop at the same step."""
        if accelerator.num_processes == 1:
            return self.signal != 0
        received = torch.tensor(self.signal, device=accelerator.device)
        self.signal = int(accelerator.gather(received).max())
        return self.signal != 0

    def exit(self) -> SystemExit:
        """Returns the exit with status 130 or 143, as a shell expects of an interrupted program."""
        return SystemExit(128 + self.signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
