"""Runs tasks in workers on a cluster of Ray, on machines that may come and go: `--engine ray`."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.core.errors import ENVIRONMENT, UserError

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 5  # how often Ray starts a worker that died again, and repeats its task
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
    machine. Ray starts a worker that died again and repeats its tasks, and workers without a task repeat those of others, so that a
    machine that is gone for good holds up nobody. Raises the `UserError` of a task, or `UserError` (5).
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
    left, waiting, running, done = enumerate(tasks), dict[int, T](), dict[Any, tuple[int, int]](), set[int]()
    try:
        while True:
            for number, worker in enumerate(workers):
                own = [task for task, runner in running.values() if runner == number]
                for _ in range(QUEUED - len(own)):
                    entry = next(left, None)
                    if entry is None and not own:  # all tasks are given out: one of another worker, which may be gone
                        entry = next(((n, task) for n, task in waiting.items() if [t for t, _ in running.values()].count(n) == 1), None)
                    if entry is not None:
                        waiting[entry[0]] = entry[1]
                        own.append(entry[0])
                        running[worker.run.remote(entry[1])] = entry[0], number
            if not waiting:
                return
            (ready,), _ = ray.wait(list(running))
            number, _ = running.pop(ready)
            if number not in done:
                result = ray.get(ready)
                done.add(number)
                del waiting[number]
                yield number, result
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"a worker of Ray died {RETRIES + 1} times: {reason[:200]} (--engine ray); see Ray's logs", ENVIRONMENT) from None
    finally:
        for worker in workers:
            ray.kill(worker)
