"""Trains variants of the method with several seeds and tabulates the effect of each component: `tpad ablate`.

A cell is a variant with a seed: an ordinary run folder, `<variant>-<seed>`, written by the ordinary commands. So a killed cell resumes,
and a phase that a cell of the same seed has finished is reused: the full method comes first for each seed, and most variants share its
K and T. The command line passes the steps in as `make`, because this package may not import the MLLM.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.core.artifact import locked
from pipeline.core.checkpoint import seconds_of
from pipeline.core.config import Config
from pipeline.core.config_file import altered
from pipeline.core.distill_config import VariantName
from pipeline.core.errors import ENVIRONMENT, UserError, note
from pipeline.core.files import read_sealed, write_sealed
from pipeline.core.process import end_with
from pipeline.data.embeddings import read_embeddings
from recommender.experiments.ablation_report import PROBES, report
from recommender.experiments.embedding_probes import attribute_columns, probe
from recommender.training.dataset import load_training_data, model_fingerprint

COST = "cost.json"


class Cell(NamedTuple):
    """A variant with a seed."""

    variant: VariantName
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    def settings(self, config: Config) -> Config:
        """Returns the config of the cell. Models other than full are trained once for each seed, on the embeddings of the full method."""
        models = [*config.sbr.models, "full"] if self.variant == "full" else ["full"]
        distill = config.distill.model_copy(update={"variant": self.variant})
        sbr = config.sbr.model_copy(update={"models": models})
        return altered(config, f"variant {self.variant}", seed=self.seed, distill=distill, sbr=sbr)


# settings, run folder, data folder, runs to reuse phases from -> "export seconds" and "export items" if the cell was exported in this call
Make = Callable[[Config, Path, Path, Sequence[Path]], dict[str, float]]


def ablate(config: Config, run: Path, data: Path, variants: Sequence[VariantName], seeds: Sequence[int], jobs: int, make: Make) -> None:
    """Makes every cell in its folder of `run`, `jobs` at a time, then writes the report. Raises `UserError`."""
    variants = list(dict.fromkeys(["full", *variants]))  # full is the reference of all others
    columns = [[Cell(variant, seed) for variant in variants] for seed in seeds]
    for cell in columns[0]:
        cell.settings(config)  # settings in conflict raise their error now, not hours later
    with locked(run):
        work = partial(make_cell, config, run, data, make)
        if jobs == 1:
            for cell in (cell for column in columns for cell in column):
                work(cell)
        else:
            make_together(columns, jobs, work)
        report(config, run, data, variants, seeds)


def make_cell(config: Config, run: Path, data: Path, make: Make, cell: Cell) -> Cell:
    """Trains and exports one cell, and probes its vectors."""
    note(f"cell: {cell.name}")
    siblings = sorted(path for path in run.glob(f"*-{cell.seed}") if path.name != cell.name)
    settings, folder = cell.settings(config), run / cell.name
    if cost := make(settings, folder, data, siblings):
        write_sealed(folder / COST, cost)
    write_probes(settings, folder, data)
    return cell


def write_probes(config: Config, folder: Path, data: Path) -> None:
    """Writes the probes of a cell's vectors, and their cost, to `probes.json`, unless it is up to date."""
    inputs = load_training_data(config, folder, data)
    fingerprint = model_fingerprint("full", config.seed, config, inputs)
    with suppress(OSError, ValueError, KeyError, TypeError):
        if read_sealed(folder / PROBES)["fingerprint"] == fingerprint:
            return
    attributes = attribute_columns(inputs.catalog, config.data.attributes)
    values = probe(read_embeddings(folder / "embeddings"), inputs.catalog, attributes, inputs.windows(config.data.max_prefix)[2])
    values["export passes"] = 2 if config.distill.variant == "side_by_side" else 1
    values["training seconds"] = sum(seconds_of(phase) for phase in (folder / "distill").iterdir() if phase.is_dir())
    with suppress(OSError, ValueError, KeyError, TypeError):
        cost = read_sealed(folder / COST)
        values["export seconds per 1000 items"] = 1000 * cost["export seconds"] / cost["export items"]
    write_sealed(folder / PROBES, {"fingerprint": fingerprint, "values": values})


def make_together(columns: Sequence[Sequence[Cell]], jobs: int, work: Callable[[Cell], Cell]) -> None:
    """Makes the cells in `jobs` processes. The first cell of each seed goes first, as the others reuse its phases."""
    waiting = {column[0].seed: column[1:] for column in columns}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=begin_process, initargs=(threads, os.getpid()))
    with pool:
        try:
            running = {pool.submit(work, column[0]) for column in columns}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    running |= {pool.submit(work, cell) for cell in waiting.pop(future.result().seed, [])}
        except BrokenProcessPool:
            raise UserError("a process of the ablation was killed (out of memory?); start again with fewer --jobs", ENVIRONMENT) from None
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # each ends after its current step, with a checkpoint
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(128 + signal.SIGINT) from None
            raise


def begin_process(threads: int, parent: int) -> None:
    """Sets up a worker process: its number of threads, and its signals."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process passes it on
    end_with(parent)
