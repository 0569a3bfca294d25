"""Process-level settings: keep freed memory (glibc malloc), and exit when the parent process dies."""

import ctypes
import os
import threading
import time

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory instead of returning it to the system; does nothing without glibc.

    Otherwise every large block is returned when it is freed, and the next one causes a page fault for each page: on a CPU a tenth of
    a training step or of the export. The process then holds its peak memory to its end, as PyTorch's allocator does on a GPU.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)


def end_with(parent: int) -> None:
    """Ends this process as soon as its parent process `parent` has ended, for whatever reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def own_share() -> tuple[int, int]:
    """Returns which of how many shares of the work a process does under `accelerate launch` or `torchrun`, from 1; (1, 1) without them."""
    return int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))


def join_cpu_processes() -> None:
    """Lets the processes of `torchrun` work together on a machine without a GPU, where accelerate otherwise leaves each alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "ACCELERATE_USE_CPU" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
