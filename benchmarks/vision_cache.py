"""What kept pictures and chunks bring, on a random model with a vision tower that is large beside its language model.

    python benchmarks/vision_cache.py cache     a transfer step, and the export, with kept pictures and without
    python benchmarks/vision_cache.py chunks    peak memory and time of steps, whole and in chunks

The model is an Idefics3 whose tower (twelve layers over 256 patches a picture) is larger than all else (16 image tokens a
picture, eight layers of language model with LoRA): what kept pictures are for. The smaller the tower's share, the less they
bring. Times are medians of interleaved rounds in one process, and their ratio is the figure; memory is that of a process of its
own. Pictures once decoded are held in memory either way, as in training.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.metrics_log import MetricsLog
from pipeline.data.catalog import load_catalog
from pipeline.data.sample_shop import draw_shop
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from pipeline.distill.distill import distill
from pipeline.distill.phases import Transfer
from pipeline.distill.process_group import Group
from pipeline.distill.trainer import train_phase
from pipeline.distill.vision_features import fill_vision_cache
from pipeline.export.export import export
from pipeline.mllm.backbone import build_backbone
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts

SHAPE = [
    *("shop.items=240", "shop.sessions=400", "shop.image_size=256", "distill.probe.every=0"),
    *("backbone.tiny.image_size=256", "backbone.tiny.patch=16", "backbone.tiny.merge=4", "backbone.tiny.heads=3"),
    *("backbone.tiny.vision_dim=192", "backbone.tiny.vision_layers=12", "backbone.tiny.dim=192", "backbone.tiny.layers=8"),
    *("distill.knowledge.steps=1", "distill.knowledge.batch=8", "distill.align.steps=1", "distill.align.batch=8", "export.workers=0"),
]
LORA = ["backbone.lora.rank=8", "backbone.lora.dropout=0.0"]


def settings(folder: Path, *more: str) -> Config:
    return load_config(None, [*SHAPE, f"backbone.name={folder / 'model'}", *LORA, *more])


def prepare(folder: Path) -> None:
    """The shop, and a random model as a user would have one: a local folder."""
    config = load_config(None, SHAPE)
    draw_shop(folder / "data", config.shop, config.data)
    backbone = build_backbone(config.backbone, Prompts(load_catalog(folder / "data"), config.data), 0)
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder / "model")
    tower, whole = (sum(p.numel() for p in of.parameters()) for of in (backbone.model.model.vision_model, backbone.model))
    print(f"{tower / 1e6:.1f} M weights in the tower, {(whole - tower) / 1e6:.1f} M beside it", file=sys.stderr)


class Steps:
    """Transfer steps of a run: their seconds."""

    def __init__(self, config: Config, folder: Path, run: Path) -> None:
        catalog = load_catalog(folder / "data")
        split = split_sessions(load_sessions(folder / "data", catalog), config.data)
        self.run, self.accelerator = run, Accelerator(cpu=True)
        views, backbone = Prompts(catalog, config.data), build_backbone(config.backbone, Prompts(catalog, config.data), 0)
        group = Group(self.accelerator)
        run.mkdir(parents=True)
        began = time.perf_counter()
        cache = fill_vision_cache(config, run, backbone, views, group) if config.distill.vision_cache_gb else None
        self.filling = time.perf_counter() - began
        encoder = PromptProcessor(config.backbone, backbone, catalog, vision_cache=cache)
        torch.manual_seed(0)
        heads = [head for of in Transfer.heads.values() for head in of]
        self.mllm = Mllm(backbone.model, heads, config.distill.dim)
        known = torch.nn.functional.normalize(torch.randn(len(catalog), config.distill.dim), dim=-1)
        self.phase = Transfer(config, views, encoder, split.train, group, {"knowledge": known})
        self.rounds = 0

    def take(self) -> float:
        """Seconds of a step, a checkpoint's share and the reading of the batch included."""
        self.rounds += 1
        began = time.perf_counter()
        checkpoints = Checkpoints(self.run / f"round-{self.rounds}", "")
        train_phase(self.phase, self.mllm, self.accelerator, checkpoints, MetricsLog(self.run / "metrics.jsonl", self.accelerator))
        return (time.perf_counter() - began) / len(self.phase)


def cache(folder: Path, rounds: int) -> None:
    steps = ["distill.transfer.steps=4", "distill.transfer.batch=16"]
    without, kept = (Steps(settings(folder, *steps, f"distill.vision_cache_gb={gb}"), folder, folder / f"steps-{gb}") for gb in (0, 1))
    print(f"kept pictures: made in {kept.filling:.1f} s", file=sys.stderr)
    without.take(), kept.take()  # decodes, warms up
    pairs = [(without.take(), kept.take()) for _ in range(rounds)]
    tell("transfer step, s", pairs)
    run = folder / "run"
    distill(settings(folder, "distill.transfer.steps=1", "distill.transfer.batch=8", "distill.vision_cache_gb=1"), run, folder / "data")
    pairs = []
    for _ in range(rounds + 1):
        shutil.move(run / "vision", folder / "aside")
        one = exported(folder, run)
        shutil.move(folder / "aside", run / "vision")
        pairs.append((one, exported(folder, run)))
    tell("export, s an item", pairs[1:])


def exported(folder: Path, run: Path) -> float:
    shutil.rmtree(run / "embeddings", ignore_errors=True)
    work = export(settings(folder), run, folder / "data").work
    return work.seconds / work.items


def tell(what: str, pairs: list[tuple[float, float]]) -> None:
    one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"| {what} | {one:.4g} | {other:.4g} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def chunks(folder: Path, rounds: int) -> None:
    for size in ("null", "16"):
        command = [sys.executable, __file__, "peak", "--folder", str(folder), "--chunk", size, "--rounds", str(rounds)]
        subprocess.run(command, check=True)


def peak(folder: Path, chunk: str, rounds: int) -> None:
    more = ["distill.transfer.steps=2", "distill.transfer.batch=256", "distill.vision_cache_gb=1", f"distill.chunk={chunk}"]
    steps = Steps(settings(folder, *more), folder, folder / f"chunk-{chunk}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [steps.take() for _ in range(rounds)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {chunk} | {after / 2**20:.2f} | {(after - before) / 2**20:.2f} | {statistics.median(seconds):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cache", "chunks", "peak"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--chunk", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "peak":
        peak(given.folder, given.chunk, given.rounds)
        return
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        (cache if given.what == "cache" else chunks)(Path(place), given.rounds)


if __name__ == "__main__":
    main()
