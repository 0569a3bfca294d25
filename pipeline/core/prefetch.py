"""Runs a function ahead of the loop that uses its results, in worker processes or a thread."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline.core.errors import ENVIRONMENT, UserError
from pipeline.core.process import end_with

T = TypeVar("T")
K = TypeVar("K")

_held: Any = None  # in a worker: what its jobs work with


def workers_on(held: Any, workers: int) -> Executor:
    """Starts `workers` processes for jobs of `ahead` that work with `held`; 0: a thread of this one.

    The processes are forks, so `held` needs no pickling.
    """
    if workers == 0:
        return ThreadPoolExecutor(1, initializer=_begin, initargs=(held, None))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (held, os.getpid()))
    pool.submit(int).result()  # forks them now, before a device is in use
    return pool


def _begin(held: Any, parent: int | None) -> None:
    global _held
    _held = held
    if parent is not None:
        torch.set_num_threads(1)
        end_with(parent)


def _run(work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    return work(_held, *arguments)


def ahead(
    pool: Executor,
    work: Callable[..., T],
    jobs: Iterable[tuple[K, tuple[Any, ...]]],
    depth: int,
    idle: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[K, T]]:
    """Yields (key, work(held, *arguments)) of each job, in order, with up to `depth` jobs running while an earlier result is used.

    `pool` is that of `workers_on`. A finished result is yielded sooner while the consumer is `idle`, as the next job may be slow to arrive.
    """
    pending: deque[tuple[K, Future[T]]] = deque()
    for key, arguments in jobs:
        pending.append((key, pool.submit(_run, work, arguments)))
        while len(pending) > depth or (pending and pending[0][1].done() and idle()):
            key, future = pending.popleft()
            yield key, future.result()
    for key, future in pending:
        yield key, future.result()


def loaded_ahead(work: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """Yields `work(number)` of each number, in order, computed by `workers` processes (0: by this one)."""
    if workers == 0:
        yield from map(work, numbers)
        return
    pool = workers_on(work, workers)
    try:
        for _, result in ahead(pool, _apply, ((None, (number,)) for number in numbers), 2 * workers):
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _apply(work: Callable[[int], T], number: int) -> T:
    return work(number)


@contextmanager
def telling_of_dead_workers(setting: str = "distill.workers") -> Iterator[None]:
    """Turns the death of a worker in the body into `UserError` (5)."""
    try:
        yield
    except BrokenExecutor:
        raise UserError(f"a worker process died, perhaps for want of memory ({setting}); lower it, or set it to 0", ENVIRONMENT) from None
