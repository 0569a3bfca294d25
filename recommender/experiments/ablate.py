"""`tpad ablate`: variants of the method, each with several seeds, and the table of what each part of it gives.

A cell is a variant with a seed: a run folder like any other, `<variant>-<seed>`, made by the ordinary commands. So it may be
killed at any moment and goes on where it was, and a phase that a cell of the same seed has finished is taken over: the
full method comes first in each seed, and most variants share its K and T. The steps are handed in by the command line,
because nothing here may import the MLLM.
"""

import json
import multiprocessing
import os
import signal
import sys
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
from pipeline.core.config import Config, VariantName
from pipeline.core.config_file import altered
from pipeline.core.errors import ENVIRONMENT, UserError
from pipeline.core.files import write_json
from pipeline.core.process import end_with
from pipeline.data.embeddings import read_embeddings
from recommender.experiments.ablation_report import PROBES, report
from recommender.experiments.embedding_probes import attribute_columns, probe
from recommender.training.dataset import load_inputs, model_fingerprint

COST = "cost.json"


class Cell(NamedTuple):
    variant: VariantName
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    def settings(self, config: Config) -> Config:
        """The config of its run. Other models than full are trained once a seed, on the embeddings of the full method."""
        models = [*config.sbr.models, "full"] if self.variant == "full" else ["full"]
        distill = config.distill.model_copy(update={"variant": self.variant})
        sbr = config.sbr.model_copy(update={"models": models})
        return altered(config, f"variant {self.variant}", seed=self.seed, distill=distill, sbr=sbr)


# settings, run folder, data folder, runs to take phases over from -> "export seconds" and "export items", where it was made now
Make = Callable[[Config, Path, Path, Sequence[Path]], dict[str, float]]


def ablate(config: Config, run: Path, data: Path, variants: Sequence[VariantName], seeds: Sequence[int], jobs: int, make: Make) -> None:
    """Every cell in a folder of `run`, `jobs` of them at a time. Raises `UserError`."""
    variants = list(dict.fromkeys(["full", *variants]))  # which everything is held against
    columns = [[Cell(variant, seed) for variant in variants] for seed in seeds]
    for cell in columns[0]:
        cell.settings(config)  # what does not go together is told now, not hours later
    with locked(run):
        work = partial(make_cell, config, run, data, make)
        if jobs == 1:
            for cell in (cell for column in columns for cell in column):
                work(cell)
        else:
            make_together(columns, jobs, work)
        report(config, run, data, variants, seeds)


def make_cell(config: Config, run: Path, data: Path, make: Make, cell: Cell) -> Cell:
    print(f"cell: {cell.name}", file=sys.stderr)
    siblings = sorted(path for path in run.glob(f"*-{cell.seed}") if path.name != cell.name)
    settings, folder = cell.settings(config), run / cell.name
    if cost := make(settings, folder, data, siblings):
        write_json(folder / COST, cost)
    write_probes(settings, folder, data)
    return cell


def write_probes(config: Config, folder: Path, data: Path) -> None:
    """What the cell's vectors hold, and what they cost, in `probes.json`, unless it stands there already."""
    inputs = load_inputs(config, folder, data)
    fingerprint = model_fingerprint("full", config.seed, config, inputs)
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / PROBES).read_bytes())["fingerprint"] == fingerprint:
            return
    attributes = attribute_columns(inputs.catalog, config.data.attributes)
    values = probe(read_embeddings(folder / "embeddings"), inputs.catalog, attributes, inputs.windows(config.data.max_prefix)[2])
    values["export passes"] = 2 if config.distill.variant == "side_by_side" else 1
    values["training seconds"] = sum(seconds_of(phase) for phase in (folder / "distill").iterdir() if phase.is_dir())
    with suppress(OSError, ValueError, KeyError, TypeError):
        cost = json.loads((folder / COST).read_bytes())
        values["export seconds per 1000 items"] = 1000 * cost["export seconds"] / cost["export items"]
    write_json(folder / PROBES, {"fingerprint": fingerprint, "values": values})


def make_together(columns: Sequence[Sequence[Cell]], jobs: int, work: Callable[[Cell], Cell]) -> None:
    """The cells of each seed, in processes of their own; those after the first wait for what it leaves to take over."""
    rest = {column[0].seed: column[1:] for column in columns}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=begin_process, initargs=(threads, os.getpid()))
    with pool:
        try:
            left = {pool.submit(work, column[0]) for column in columns}
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    left |= {pool.submit(work, cell) for cell in rest.pop(future.result().seed, [])}
        except BrokenProcessPool:
            raise UserError("a process of the ablation was killed (out of memory?); start again with fewer --jobs", ENVIRONMENT) from None
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # they leave after the step in hand, with a checkpoint
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(128 + signal.SIGINT) from None
            raise


def begin_process(threads: int, parent: int) -> None:
    """A core or more for each."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process passes it on
    end_with(parent)
