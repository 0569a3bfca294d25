"""Runs tasks in workers on a cluster of Ray, on machines that may come and go: `--engine ray`."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.core.errors import ENVIRONMENT, UserError

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 5  # how often Ray starts a worker that died again, and repeats its task
SILENCE = 60.0  # seconds without a result after which workers that have nothing to do repeat the tasks of others
QUEUED = 2  # tasks a worker has at a time: the next one lies there when it is done with one


class Worker:
    """Builds what does the work, once in each process, in the folder where the command was given."""

    def __init__(self, folder: str, build: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        self.work = build(*arguments)

    def run(self, task: Any) -> Any:
        return self.work(task)


def on_ray(build: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
    """Yields (n, work(task)) of the n-th task as it is done, in any order; `work` is what `build(*arguments)` returns in each worker.

    There is a worker for each GPU of the cluster, or for each core where there is none. The cluster is that of RAY_ADDRESS, else this
    machine. Ray starts a worker that died again and repeats its tasks. Workers that have nothing to do repeat those of others if nothing
    has come for `SILENCE`, so that a machine that is gone for good holds up nobody. Raises the `UserError` of a task, or `UserError` (5).
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("ray is not installed (--engine ray); install the extra `ray`", ENVIRONMENT) from None
    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"no cluster of Ray: {reason[:200]} (RAY_ADDRESS); start one, or unset it", ENVIRONMENT) from None
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actor: Any = ray.remote(num_cpus=1, num_gpus=bool(gpus) * 1, max_restarts=RETRIES, max_task_retries=RETRIES)(Worker)
    workers = [actor.remote(os.getcwd(), build, arguments) for _ in range(gpus or int(resources.get("CPU", 1)))]
    left, waiting, running = enumerate(tasks), dict[int, T](), dict[Any, tuple[int, int]]()  # running: reference -> task and worker
    silent = False
    try:
        while True:
            for number, worker in enumerate(workers):
                queued = sum(runner == number for _, runner in running.values())
                entries = list(itertools.islice(left, QUEUED - queued))
                if silent and not queued and not entries:
                    shared = [task for task, _ in running.values()]
                    entries = [(n, task) for n, task in waiting.items() if shared.count(n) == 1][:1]
                for n, task in entries:
                    waiting[n] = task
                    running[worker.run.remote(task)] = n, number
            if not waiting:
                return
            ready, _ = ray.wait(list(running), timeout=SILENCE)
            silent = not ready
            for reference in ready:
                n, _ = running.pop(reference)
                if waiting.pop(n, None) is not None:
                    yield n, ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"a worker of Ray died {RETRIES + 1} times: {reason[:200]} (--engine ray); see Ray's logs", ENVIRONMENT) from None
    finally:
        for worker in workers:
            ray.kill(worker)


def in_order(results: Iterable[tuple[int, R]]) -> Iterator[R]:
    """Yields the results of `on_ray` in the order of their tasks."""
    early: dict[int, R] = {}
    expected = 0
    for n, result in results:
        early[n] = result
        while expected in early:
            yield early.pop(expected)
            expected += 1
