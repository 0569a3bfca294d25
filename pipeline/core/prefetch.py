"""What a loop over the model needs, made ahead of it in worker processes or threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from pipeline.core.errors import ENVIRONMENT, UserError

T = TypeVar("T")


class Jobs(Dataset[T | UserError]):
    def __init__(self, work: Callable[[int], T], numbers: Sequence[int]) -> None:
        self.work, self.numbers = work, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> T | UserError:
        try:
            return self.work(self.numbers[place])
        except UserError as error:  # PyTorch would hand it on as an error of another kind
            return error


def loaded_ahead(work: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """`work(number)` of each, in order, by so many processes (0: in line), which are forks: what `work` holds needs no pickling."""
    context = "fork" if workers else None
    for found in DataLoader(Jobs(work, numbers), batch_size=None, num_workers=workers, multiprocessing_context=context):
        if isinstance(found, UserError):
            raise found
        yield found


@contextmanager
def telling_of_dead_workers() -> Iterator[None]:
    """Around the whole loop: PyTorch raises it wherever the main process is when a worker dies."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = "a worker process died, perhaps for want of memory (distill.workers)"
        raise UserError(f"{what}; lower it, or set it to 0", ENVIRONMENT) from None


K = TypeVar("K")
R = TypeVar("R")


def ahead(
    pool: Executor,
    work: Callable[..., R],
    jobs: Iterable[tuple[K, tuple[Any, ...]]],
    depth: int,
    idle: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[K, R]]:
    """(key, work(*arguments)) of each job, in order, `depth` of them under way while the one before is used; fewer while whoever
    uses them is `idle`, for jobs may be slow to come."""
    begun: deque[tuple[K, Any]] = deque()
    try:
        for key, arguments in jobs:
            begun.append((key, pool.submit(work, *arguments)))
            while len(begun) > depth or (begun and begun[0][1].done() and idle()):
                key, future = begun.popleft()
                yield key, future.result()
        for key, future in begun:
            yield key, future.result()
    except BrokenExecutor:
        raise UserError("a worker process died, perhaps for want of memory (export.workers); set it to 0", ENVIRONMENT) from None
