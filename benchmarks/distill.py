"""Training steps of each phase: tokens a second, and the peak memory of the device beside what benchmarks/memory.py computes.

    python benchmarks/random_backbone.py configs/qwen3-vl-2b.yaml artifacts/random
    python benchmarks/distill.py configs/qwen3-vl-2b.yaml --set backbone.name=artifacts/random

Items and sessions are those of the sample shop, with pictures of 256 pixels a side. A step's seconds are a median, without
the first two; tokens are those of all its sequences, image tokens included and padding not. Pairs are those that T learns from: of its
blocks, and of session prompts alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from memory import SHAPES, memory

from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.metrics_log import MetricsLog
from pipeline.data.catalog import load_catalog
from pipeline.data.sample_shop import draw_shop
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from pipeline.distill.phases import PHASES, Transfer
from pipeline.distill.process_group import Group
from pipeline.distill.trainer import train_phase
from pipeline.mllm.backbone import build_backbone
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.vision_tower import pack_attention

WARM = 2


class Watch(MetricsLog):
    """When each step was over: its figures are read from the device then."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        super().__init__(path, accelerator)
        self.over: list[float] = []

    def log(self, phase: str, step: int, values: dict[str, Any]) -> None:
        super().log(phase, step, values)
        self.over.append(time.perf_counter())


def prompts_alone(config: Config) -> Config:
    """T as it learned before there were blocks: 32 session prompts, whose candidates are the items they ask for."""
    transfer = config.distill.transfer.model_copy(update={"batch": 1, "sessions": 32})
    return config.model_copy(update={"distill": config.distill.model_copy(update={"transfer": transfer})})


def pairs_of(facts: dict[str, torch.Tensor], config: Config) -> float:
    """Pairs of events that a step of T learns from: those of the log within the block, or one for each question of a prompt."""
    if "pairs" not in facts:
        return 0.0
    return float(facts["pairs"].sum() if config.distill.transfer.batch > 1 else (facts["target"] >= 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    steps = [f"distill.{kind.name}.steps={given.steps + WARM}" for kind in PHASES]
    config = load_config(given.config, ["shop.image_size=256", "distill.probe.every=0", *steps, *given.set])
    published = load_config(given.config)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draw_shop(folder, config.shop, config.data)
        catalog = load_catalog(folder)
        split = split_sessions(load_sessions(folder, catalog), config.data)
        accelerator = Accelerator()
        group, views = Group(accelerator), Prompts(catalog, config.data)
        torch.manual_seed(0)
        drawn = torch.nn.functional.normalize(torch.randn(len(catalog), config.distill.dim), dim=-1).to(accelerator.device)
        backbone = build_backbone(config.backbone, views, config.seed)
        pack_attention(backbone.model, accelerator.device)
        encoder = PromptProcessor(config.backbone, backbone, catalog)
        mllm = Mllm(backbone.model, [head for kind in PHASES for of in kind.heads.values() for head in of], config.distill.dim)
        heads = ("phase", "sequences a step", "tokens a step", "pairs a step", "s a step", "tokens a second", "pairs a second", "peak GB")
        print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
        rows = [(kind.name, kind, config) for kind in PHASES]
        rows.insert(2, ("transfer, session prompts alone", Transfer, prompts_alone(config)))
        for name, kind, settings in rows:
            phase = kind(settings, views, encoder, split.train, group, {"knowledge": drawn, "transition": drawn})
            watch = Watch(folder / "metrics.jsonl", accelerator)
            if accelerator.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            train_phase(phase, mllm, accelerator, Checkpoints(folder / name, ""), watch)
            masks = [
                [of["attention_mask"] for chunk in phase[n][0] for of in chunk.values() if "attention_mask" in of] for n in range(WARM)
            ]
            tokens, sequences = (statistics.mean(sum(map(count, of)) for of in masks) for count in (lambda m: int(m.sum()), len))
            seconds = statistics.median(b - a for a, b in zip(watch.over[WARM - 1 :], watch.over[WARM:], strict=False))
            peak = torch.cuda.max_memory_allocated() / 1e9 if accelerator.device.type == "cuda" else float("nan")
            pairs = statistics.mean(pairs_of(phase[n][1], settings) for n in range(WARM))
            cells = [f"{sequences:.0f}", f"{tokens:,.0f}", f"{pairs:,.0f}", f"{seconds:.2f}", f"{tokens / seconds:,.0f}"]
            print(f"| {name} | {' | '.join(cells)} | {pairs / seconds:,.0f} | {peak:.1f} |", flush=True)
        if published.backbone.name in SHAPES:
            print(f"computed for the largest step by benchmarks/memory.py: {memory(published)['total']:.1f} GB")


if __name__ == "__main__":
    main()
