"""Runs a function ahead of the loop that uses its results, in worker processes or threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from pipeline.core.errors import ENVIRONMENT, UserError

T = TypeVar("T")


class Jobs(Dataset[T | UserError]):
    """A data set whose items are the results of `work(number)`."""

    def __init__(self, work: Callable[[int], T], numbers: Sequence[int]) -> None:
        self.work, self.numbers = work, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> T | UserError:
        try:
            return self.work(self.numbers[position])
        except UserError as error:  # PyTorch would raise it as another exception
            return error


def loaded_ahead(work: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """Yields `work(number)` of each number, in order, computed by `workers` processes (0: by this one).

    The processes are forks, so `work` needs no pickling.
    """
    context = "fork" if workers else None
    for result in DataLoader(Jobs(work, numbers), batch_size=None, num_workers=workers, multiprocessing_context=context):
        if isinstance(result, UserError):
            raise result
        yield result


@contextmanager
def telling_of_dead_workers() -> Iterator[None]:
    """Turns the death of a worker in the body into `UserError` (5); PyTorch raises it at any point of the loop."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a worker process died, perhaps for want of memory (distill.workers); lower it, or set it to 0", ENVIRONMENT
        ) from None


K = TypeVar("K")
R = TypeVar("R")


def ahead(
    pool: Executor,
    work: Callable[..., R],
    jobs: Iterable[tuple[K, tuple[Any, ...]]],
    depth: int,
    idle: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[K, R]]:
    """Yields (key, work(*arguments)) of each job, in order, with up to `depth` jobs running while an earlier result is used.

    A finished result is yielded sooner while the consumer is `idle`, since the next job may be slow to arrive.
    """
    pending: deque[tuple[K, Any]] = deque()
    try:
        for key, arguments in jobs:
            pending.append((key, pool.submit(work, *arguments)))
            while len(pending) > depth or (pending and pending[0][1].done() and idle()):
                key, future = pending.popleft()
                yield key, future.result()
        for key, future in pending:
            yield key, future.result()
    except BrokenExecutor:
        raise UserError("a worker process died, perhaps for want of memory (export.workers); set it to 0", ENVIRONMENT) from None
