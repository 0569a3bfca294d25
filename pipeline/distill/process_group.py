"""Communication between the processes of a distributed run."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


class Group:
    """Gathers, sums and shares tensors over the processes, and keeps the gradient of this process's part."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.rank, self.world = accelerator, accelerator.process_index, accelerator.num_processes

    def gather(self, x: Tensor) -> Tensor:
        """Concatenates the (b, ...) of all processes, in their order: (B, ...)."""
        if self.world == 1:
            return x
        parts = list(self.accelerator.gather(x.detach()).split(len(x)))
        parts[self.rank] = x
        return torch.cat(parts)

    def total(self, x: Tensor) -> Tensor:
        """Sums over the processes."""
        if self.world == 1:
            return x
        summed: Tensor = self.accelerator.reduce(x.detach().clone(), "sum")
        return summed + x - x.detach() if x.requires_grad else summed  # equal to the bit on all processes

    def most(self, count: int) -> int:
        """Returns the largest count of all processes."""
        return count if self.world == 1 else int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def share(self, batch: np.ndarray) -> np.ndarray:
        """Returns this process's contiguous share of a global batch."""
        part: np.ndarray = np.array_split(batch, self.world)[self.rank]
        return part
