"""Export on a GPU, beside what its matrix units can do.

    python benchmarks/random_backbone.py configs/qwen3-vl-2b.yaml artifacts/random
    python benchmarks/export_gpu.py configs/qwen3-vl-2b.yaml --set backbone.name=artifacts/random --items 6000

The catalogue is the skewed one of benchmarks/export.py. Loops alone are timed, without the loading before and the publishing
after them, in one process, one after the other, and the first is run once more beforehand. `plain` is the loop people write,
over 600 items; `forward` our export with every batch read before the clock starts: what the model alone needs. MFU is the
share of the matrix rate that is measured here, at 8,192 squared, counting the layers of language model and vision tower.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import memory
import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from export import fresh, plain, prepared, tpad
from pipeline.core.artifact import open_verified
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.export import exporter
from pipeline.export.exporter import own_device

PLAIN_ITEMS = 600


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (time.perf_counter() - began))
    return best


def flops(run: Path, config: Config) -> float:
    """Of the whole catalogue: matrix products and attention of the layers, in language model and vision tower; a lower bound."""
    saved = open_verified(run / "mllm", "mllm", "").path
    shape = AutoConfig.from_pretrained(saved)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape)
    weights = {name: p.numel() for name, p in model.named_parameters() if re.search(r"\.(layers|blocks)\.\d", name)}
    seen = sum(count for name, count in weights.items() if name.removeprefix("model.").startswith("vis"))
    text, vision = shape.get_text_config(), shape.vision_config
    exported = sorted(open_verified(run / "embeddings", "embeddings", "").path.glob("part-*.parquet"))
    found = pq.read_table(exported, columns=["n_tokens", "has_image"])
    lengths, pictures = found["n_tokens"].to_numpy().astype(float), int(found["has_image"].to_numpy().sum())
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    language = 2 * (sum(weights.values()) - seen) * lengths.sum() + 2 * width * text.num_hidden_layers * (lengths**2).sum()  # causal
    patches, _ = memory.picture(shape, config.backbone.max_pixels)
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    return float(language + pictures * patches * (2 * seen + 4 * patches * vision.hidden_size * depth))


def forward_only(config: Config, run: Path, data: Path, out: Path) -> dict[str, Any]:
    """Our export, with every batch read before the first one is computed; timed from there to the last part written."""
    marks: list[float] = []
    ahead, whole = exporter.ahead, exporter.Exporter.run

    def all_first(*arguments: Any) -> Any:
        ready = list(ahead(*arguments))
        marks.append(time.perf_counter())
        yield from ready

    def to_the_end(self: exporter.Exporter, names: Sequence[str], show: bool = True) -> None:
        whole(self, names, show)
        marks.append(time.perf_counter())

    exporter.ahead, exporter.Exporter.run = all_first, to_the_end  # type: ignore[assignment, method-assign]
    try:
        return tpad(config, run, data, out) | {"running": marks[-1] - marks[-2]}
    finally:
        exporter.ahead, exporter.Exporter.run = ahead, whole  # type: ignore[method-assign]


def profile(config: Config, run: Path, data: Path, out: Path) -> dict[str, Any]:
    """`forward`, and what the device did meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        found = forward_only(config, run, data, out)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70), file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--folder", type=Path, default=Path("artifacts/benchmark-export"))
    parser.add_argument("--items", type=int, default=6000)
    parser.add_argument("--side", type=int, default=400, help="pixels a side of the pictures")
    parser.add_argument("--methods", nargs="+", default=["plain", "forward", "tpad", "compiled forward", "compiled tpad", "profile"])
    given = parser.parse_args()
    config = load_config(given.config, ["backbone.max_text_tokens=300", *given.set])
    run, data = prepared(given.folder, config, given.items, given.side)
    few = prepared(given.folder, config, PLAIN_ITEMS, given.side) if "plain" in given.methods else None
    ways: dict[str, Callable[..., dict[str, Any]]] = {"plain": plain, "forward": forward_only, "tpad": tpad, "profile": profile}
    found: dict[str, dict[str, Any]] = {}
    vectors = {}
    for name in ("forward", *given.methods):
        _, compiled, way = name.rpartition("compiled ")
        own = config.model_copy(update={"export": config.export.model_copy(update={"compile": bool(compiled)})}) if compiled else config
        where = few if few and way == "plain" else (run, data)
        fresh(where[0])
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        found[name] = ways[way](own, *where, given.folder / "vectors.npy")
        found[name]["gib"] = torch.cuda.max_memory_allocated() / 2**30
        vectors[name] = np.load(given.folder / "vectors.npy")
        print(f"{name}: {found[name]['running']:.2f} s of {time.perf_counter() - began:.1f}", file=sys.stderr, flush=True)
    device = own_device()
    peak = matmul_peak(device, getattr(torch, config.backbone.dtype))
    work = flops(run, config) / given.items
    print(f"{torch.cuda.get_device_name(device)}: {peak / 1e12:.0f} TFLOP/s; {work / 1e12:.2f} TFLOP an item of {given.items}")
    print("| export | items/s | tokens/s | MFU | padding | GiB of the device | greatest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one in found.items():
        seconds = one["running"]
        apart = np.abs(vectors[name] - vectors["forward"]).max() if len(vectors[name]) == given.items else float("nan")
        tokens = f"{one['tokens'] / seconds:,.0f}" if "tokens" in one else ""
        print(
            f"| {name} | {one['items'] / seconds:,.0f} | {tokens} | {work * one['items'] / seconds / peak:.1%} | {one['padding']:.1%} "
            f"| {one['gib']:.1f} | {apart:.1e} |"
        )
    for prefix in ("", "compiled "):
        if {f"{prefix}tpad", f"{prefix}forward"} <= found.keys():
            share = found[f"{prefix}forward"]["running"] / found[f"{prefix}tpad"]["running"]
            print(f"{prefix}end to end: {share:.0%} of the forward passes alone")


if __name__ == "__main__":
    main()
