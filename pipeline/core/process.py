"""What holds for a whole process: the memory it has freed, and whom it ends with."""

import ctypes
import os
import threading
import time

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """glibc gives every large block back to the system when it is freed, and each page of the next one is a fault and zeroed again:
    on a CPU that is a tenth of a training step, or of the export. Kept, the process holds its peak to its end, as it does in
    PyTorch's own allocator on a GPU. Elsewhere than in glibc nothing is done."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)


def end_with(parent: int) -> None:
    """This process does not outlive the one that it works for, whatever ends that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def join_cpu_processes() -> None:
    """Lets the processes of `torchrun` work together on a machine without a GPU, where accelerate otherwise leaves each alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "ACCELERATE_USE_CPU" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
