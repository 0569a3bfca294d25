"""The processes of a distributed run."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


class Group:
    """The processes of a run: gathering that keeps the gradient of what was made here."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.rank, self.world = accelerator, accelerator.process_index, accelerator.num_processes

    def gather(self, x: Tensor) -> Tensor:
        """(b, ...) of every process -> (B, ...), in order of the processes."""
        if self.world == 1:
            return x
        parts = list(self.accelerator.gather(x.detach()).split(len(x)))
        parts[self.rank] = x
        return torch.cat(parts)

    def total(self, x: Tensor) -> Tensor:
        if self.world == 1:
            return x
        summed: Tensor = self.accelerator.reduce(x.detach().clone(), "sum")
        return summed + x - x.detach() if x.requires_grad else summed  # to the bit the same everywhere

    def most(self, count: int) -> int:
        """The greatest of the processes' counts."""
        return count if self.world == 1 else int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def share(self, of: np.ndarray) -> np.ndarray:
        """This process's contiguous share of a global batch."""
        part: np.ndarray = np.array_split(of, self.world)[self.rank]
        return part
