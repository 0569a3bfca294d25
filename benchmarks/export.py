"""Export against the two loops people write: a plain transformers loop, and sentence-transformers' `encode`.

    python benchmarks/export.py compare --items 2048      speed, padding, share of computing, memory; interleaved rounds
    python benchmarks/export.py memory                    peak memory at 10,000 and 200,000 items
    python benchmarks/export.py update --items 20000      an update of 1 % against a full export
    python benchmarks/export.py compare --data DIR        a catalogue of your own instead of the skewed one

The skewed catalogue: texts of 1 to 300 tokens, most of them short, half of the items with a picture. The MLLM is the
built-in tiny one as it is drawn, untrained, which costs the same. All methods have the same weights and prompts, and
their vectors are held against each other. Each measurement is a process of its own, from the loaded libraries to the
vectors on disk; figures are medians of interleaved rounds, with one process more for scaling. `--config` takes another backbone
than the tiny one, `--side` larger pictures. What a GPU makes of it: benchmarks/export_gpu.py.
"""

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

from pipeline.core.artifact import open_verified
from pipeline.core.config import Config
from pipeline.core.config_file import load_config, save_config
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.distill.distill import publish
from pipeline.export.export import export
from pipeline.export.exporter import own_device
from pipeline.mllm.backbone import build_backbone, folder_sha256
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.saved_mllm import load_mllm

BATCH = 32  # of the plain loop and of sentence-transformers: their usual default
METHODS = ("plain", "sentence-transformers", "tpad")
SHAPES = {  # share of the items, least and most words: about as many tokens
    "a few words": (0.55, 1, 12),
    "a line": (0.25, 12, 60),
    "a paragraph": (0.15, 60, 200),
    "a page": (0.05, 200, 300),
}


# --- what is exported


def write_catalogue(data: Path, items: int, side: int, seed: int = 0) -> None:
    """Skewed lengths, and a picture for every second item; row groups of 1,024, written one by one."""
    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = np.array(["".join(rng.choice(letters, size=rng.integers(2, 6))) for _ in range(120)])
    shares, least, most = (np.array(column) for column in zip(*SHAPES.values(), strict=True))
    drawn = [picture(rng, side) for _ in range(64)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("image", kind)])
    data.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(data / "items.parquet", schema) as writer:
        for first in range(0, items, 1024):
            count = min(1024, items - first)
            shape = rng.choice(len(SHAPES), count, p=shares)
            lengths = rng.integers(least[shape], most[shape] + 1)
            titles = [" ".join(rng.choice(words, size=length)) for length in lengths]
            item_ids = [f"i{first + n:07d}" for n in range(count)]
            files = [numbered(drawn[rng.integers(len(drawn))], item) if rng.random() < 0.5 else None for item in item_ids]
            pictures = [file and {"bytes": file, "path": None} for file in files]
            writer.write_table(pa.table([item_ids, titles, pa.array(pictures, kind)], schema=schema))


def picture(rng: np.random.Generator, side: int) -> bytes:
    image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def numbered(jpeg: bytes, item: str) -> bytes:
    """The same picture in a file of its own, which is then a picture of its own: one with a comment."""
    return jpeg[:2] + b"\xff\xfe" + (len(item) + 2).to_bytes(2, "big") + item.encode() + jpeg[2:]


def write_model(run: Path, data: Path, config: Config) -> None:
    """The backbone as training starts from it, published as if it had been trained."""
    catalog = load_catalog(data)
    torch.manual_seed(0)
    views = Prompts(catalog, config.data)
    backbone = build_backbone(config.backbone, views, 0)
    mllm = Mllm(backbone.model, ("knowledge", "transition"), config.distill.dim)
    publish(run, config, views, mllm, backbone, folder_sha256(config.backbone), "", "benchmark")


# --- the ways to export it


def tpad(config: Config, run: Path, data: Path, out: Path, update: bool = False) -> dict[str, Any]:
    found = export(config, run, data, update)
    assert found.version is not None
    work, items = found.work, found.version.manifest["rows"]
    vectors = read_embeddings(run / "embeddings") if items <= 50_000 else None
    if vectors is not None:
        np.save(out, np.concatenate([vectors.knowledge, vectors.transition], axis=1))
    return {
        "items": items,
        "running": work.seconds,  # without the loading before and the publishing after it
        "padding": work.padding,
        "computing": work.computing,
        "encoding": work.encoding,
        "decoding": work.decoding,
        "tokens": work.tokens,
    }


def loaded(run: Path, data: Path) -> tuple[Mllm, PromptProcessor, Prompts, torch.device]:
    config = load_config(run / "config.yaml")
    mllm, backbone, _ = load_mllm(open_verified(run / "mllm", "mllm", "").path)
    catalog = load_catalog(data)
    device = own_device()
    return mllm.to(device).eval(), PromptProcessor(config.backbone, backbone, catalog, 0), Prompts(catalog, config.data), device


def features(mllm: Mllm, states: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.nn.functional.normalize(mllm.heads[half](states.float()), dim=-1) for half in ("knowledge", "transition")], 1)


def forward(
    mllm: Mllm, encoder: PromptProcessor, inputs: dict[str, torch.Tensor], pixels: list[dict[str, torch.Tensor]], device: torch.device
) -> torch.Tensor:
    """Last hidden state of each sequence's last token, with the model called as its documentation shows it."""
    shown = encoder.family.stack(pixels) if pixels else {}
    if pixels and not encoder.family.sized:
        shown = {"pixel_values": shown["pixel_values"].transpose(0, 1)}  # (1, n, 3, H, W)
    given = {name: value.to(device) for name, value in (inputs | shown).items()}
    states = mllm.backbone.model(**given, use_cache=False).last_hidden_state
    return states[torch.arange(len(states)), given["attention_mask"].sum(1) - 1]


def plain(config: Config, run: Path, data: Path, out: Path) -> dict[str, Any]:
    """Arrival order, 32 at a time, padded to the longest, pictures decoded in line, `.cpu()` after every batch."""
    mllm, encoder, views, device = loaded(run, data)
    vectors = []
    computing, real, padded, started = 0.0, 0, 0, time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(views), BATCH):
            sequences = [encoder.encode(views.item(row)) for row in range(first, min(first + BATCH, len(views)))]
            inputs = encoder.collate({"items": sequences})["items"]
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs}
            began = time.perf_counter()
            states = forward(mllm, encoder, inputs, [p.tensors for s in sequences for p in s.images], device)
            vectors.append(features(mllm, states).cpu())
            computing += time.perf_counter() - began
            real, padded = real + sum(map(len, sequences)), padded + inputs["input_ids"].numel()
    np.save(out, torch.cat(vectors).numpy())
    return {"items": len(views), "running": time.perf_counter() - started, "padding": 1 - real / padded, "computing": computing}


def sentence_transformers(config: Config, run: Path, data: Path, out: Path) -> dict[str, Any]:
    """`SentenceTransformer.encode` with its defaults, over the same backbone.

    Its own module loads no model without torchvision's video processors, or asks for a chat template, so this one stands
    in its place: the same prompts, tokenizer and image processor as in the other two, without those of their own.
    """
    from sentence_transformers import SentenceTransformer

    mllm, encoder, views, device = loaded(run, data)
    spent = {"computing": 0.0, "real": 0, "padded": 0}

    class Module(torch.nn.Module):
        def preprocess(self, inputs: list[dict[str, Any]], prompt: str | None = None, **_: Any) -> dict[str, Any]:
            sequences = [encoder.encode(views.item(item["row"])) for item in inputs]
            batch = encoder.collate({"items": sequences})["items"]
            spent["real"] += sum(map(len, sequences))
            spent["padded"] += batch["input_ids"].numel()
            batch = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in batch}
            return batch | {"pixels": [p.tensors for s in sequences for p in s.images]}

        def forward(self, given: dict[str, Any]) -> dict[str, Any]:
            began = time.perf_counter()
            inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
            states = forward(mllm, encoder, inputs, given["pixels"], device)
            given["sentence_embedding"] = features(mllm, states)
            spent["computing"] += time.perf_counter() - began
            return given

    inputs = []
    for row in range(len(views)):
        image = views.catalog.image_bytes(row)
        inputs.append({"row": row, "text": views.text(row)} | ({} if image is None else {"image": Image.open(io.BytesIO(image))}))
    vectors = SentenceTransformer(modules=[Module()], device=str(device)).encode(inputs, show_progress_bar=False)
    np.save(out, vectors)
    return {"items": len(views), "padding": 1 - spent["real"] / spent["padded"], "computing": spent["computing"]}


# --- measuring: each in a process of its own


def measure(name: str, run: Path, data: Path, out: Path, update: bool) -> None:
    """Runs one method and prints what it took, as JSON."""
    config = load_config(run / "config.yaml")
    saved = AutoConfig.from_pretrained(open_verified(run / "mllm", "mllm", "").path)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(saved)]  # imports the model's module: a library, as the others
    pa.scalar(0)  # and pyarrow, at its first scalar, pandas, where it is installed
    began = time.perf_counter()
    if name == "tpad":
        found = tpad(config, run, data, out, update)
    else:
        found = {"plain": plain, "sentence-transformers": sentence_transformers}[name](config, run, data, out)
    found["seconds"] = time.perf_counter() - began
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def measured(name: str, run: Path, data: Path, *more: str, processes: int = 1) -> dict[str, Any]:
    """One measurement, by `processes` of them at once (which share the work of an export)."""
    command = [sys.executable, __file__, "measure", "--method", name, "--run", str(run), "--data", str(data), *more]
    began = time.perf_counter()
    shares = [os.environ | {"RANK": str(number), "WORLD_SIZE": str(processes)} for number in range(processes)]  # as a launcher gives them
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=share) for share in shares]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{name} failed")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    worst = max(found, key=lambda one: one["seconds"])
    return worst | {"command": time.perf_counter() - began}


def fresh(run: Path) -> None:
    shutil.rmtree(run / "embeddings", ignore_errors=True)


def compare(folder: Path, run: Path, data: Path, rounds: int, methods: list[str]) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    two: list[dict[str, Any]] = []
    vectors = {}
    for number in range(rounds):
        for name in methods:
            fresh(run)
            out = folder / f"{name}.npy"
            found.setdefault(name, []).append(measured(name, run, data, "--out", str(out)))
            vectors[name] = np.load(out)
            print(f"round {number + 1}, {name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
        if "tpad" in methods:
            fresh(run)
            two.append(measured("tpad", run, data, "--out", str(folder / "two.npy"), processes=2))
    medians = {name: {key: statistics.median(one[key] for one in many) for key in many[0]} for name, many in found.items()}
    print("| method | items/s | time, against the last | padding | model computing | peak memory | greatest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one in medians.items():
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(found[name], found[methods[-1]], strict=True))
        difference = np.abs(vectors[name] - vectors[methods[-1]]).max()
        print(
            f"| {name} | {one['items'] / one['seconds']:.0f} | {ratio:.2f} x | {one['padding']:.1%} "
            f"| {one['computing'] / one['seconds']:.0%} | {one['peak_mb']:.0f} MB | {difference:.1e} |"
        )
    if "tpad" not in methods:
        return
    ours = medians["tpad"]
    scaled = statistics.median(a["command"] / b["command"] for a, b in zip(found["tpad"], two, strict=True))
    print(f"two processes: {scaled:.2f}x as fast as one, start-up included")
    print(f"reading texts and pictures: {ours['encoding']:.1f} s of the worker, {ours['encoding'] / ours['seconds']:.0%} of the wall time;")
    print(f"decoding pictures: {ours['decoding']:.1f} s, {ours['decoding'] / ours['seconds']:.0%} of the wall time")


def memory(folder: Path, config: Config) -> None:
    peaks = []
    for items in (10_000, 200_000):
        run, data = prepared(folder, config, items)
        fresh(run)
        peaks.append(measured("tpad", run, data)["peak_mb"])
        print(f"{items} items: peak memory of the exporting process {peaks[-1]:.0f} MB", flush=True)
    print(f"{peaks[1] / peaks[0]:.2f}x")


def update(folder: Path, config: Config, items: int) -> None:
    run, data = prepared(folder, config, items)
    fresh(run)
    full = measured("tpad", run, data)
    before = read_embeddings(run / "embeddings")
    changed = change(data, items // 100)
    again = measured("tpad", run, data, "--update")
    after = read_embeddings(run / "embeddings")
    same = [
        np.array_equal(getattr(before, half)[row], getattr(after, half)[row])
        for row in range(items)
        for half in ("knowledge", "transition")
    ]
    print(f"{items} items, {len(changed)} of them changed")
    for what, key in (("from the loaded libraries", "seconds"), ("as whole processes, imports included", "command")):
        print(f"{what}: full {full[key]:.1f} s, update {again[key]:.2f} s, {again[key] / full[key]:.1%}")
    print(f"rows of changed vectors: {len({n // 2 for n, equal in enumerate(same) if not equal})}")


def change(data: Path, count: int) -> list[int]:
    """Other words in `count` items, drawn from all over the catalogue."""
    table = pq.read_table(data / "items.parquet")
    rows = np.random.default_rng(1).choice(len(table), count, replace=False).tolist()
    titles = table["title"].to_pylist()
    for row in rows:
        titles[row] += " changed"
    table = table.set_column(1, "title", pa.array(titles))
    pq.write_table(table, data / "items.parquet", row_group_size=1024)
    return rows


def prepared(folder: Path, config: Config, items: int, side: int = 128, data: Path | None = None) -> tuple[Path, Path]:
    run = folder / f"run-{items}"
    if data is None:
        data = folder / f"data-{items}"
        write_catalogue(data, items, side)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    write_model(run, data, config)
    return run, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "memory", "update", "measure"))
    parser.add_argument("--folder", type=Path, default=Path("artifacts/benchmark-export"))
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--side", type=int, default=128, help="pixels a side of the pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--method")
    parser.add_argument("--out", type=Path, default=Path("/dev/null"))
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.method, given.run, given.data, given.out, given.update)
        return
    config = load_config(given.config, ["backbone.max_text_tokens=300", *given.set])
    if given.what == "compare":
        run, data = prepared(given.folder, config, given.items, given.side, given.data)
        compare(given.folder, run, data, given.rounds, given.methods)
    elif given.what == "memory":
        memory(given.folder, config)
    else:
        update(given.folder, config, given.items)


if __name__ == "__main__":
    main()
