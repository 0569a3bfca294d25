"""A shop of forty items, and settings that distil it in seconds on one core."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from cli import open_teacher
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import UserError as UserError
from pipeline.distill.distill import distill
from pipeline.export.export import export

ROOT = Path(__file__).parents[2]
PHASES = ("knowledge", "transfer", "align")
SHOP = ["shop.items=40", "shop.sessions=200", "shop.image_size=24"]
TINY = [
    *("backbone.tiny.vocab=400", "backbone.tiny.image_size=24", "backbone.tiny.patch=6", "backbone.tiny.heads=2"),
    *("backbone.tiny.vision_dim=16", "backbone.tiny.vision_layers=1", "backbone.tiny.dim=32", "backbone.tiny.layers=1"),
]
STEPS = 6
TRAINING = ["distill.dim=16", "distill.checkpoint_every=2", "distill.critic.warmup=2", "distill.probe.every=3"]
TRAINING += ["export.shard_rows=16", "export.workers=0"]
TRAINING += [f"distill.{phase}.{setting}" for phase in PHASES for setting in (f"steps={STEPS}", "batch=8")]
SETTINGS = [*SHOP, *TINY, *TRAINING]


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *more])


def distill_run(run: Path, data: Path, *more: str, fresh: bool = False) -> bool:
    torch.set_num_threads(1)
    return distill(settings(*more), run, data, fresh, open_teacher=open_teacher)


def export_run(run: Path, data: Path, *more: str) -> None:
    torch.set_num_threads(1)
    export(settings(*more), run, data)


def change_items(data: Path, to: Path, images: dict[int, bytes | str | None], titles: dict[int, str]) -> Path:
    """The data folder with other images (bytes, or the path of a file) and titles in some rows."""
    shutil.copytree(data, to)
    table = pq.read_table(to / "items.parquet")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for row, image in images.items():
        kind = "path" if isinstance(image, str) else "bytes"
        columns["image"][row] = None if image is None else {"bytes": None, "path": None} | {kind: image}
    for row, title in titles.items():
        columns["title"][row] = title
    pq.write_table(pa.table(columns, schema=table.schema), to / "items.parquet")
    return to


def published_folder(run: Path, kind: str) -> Path:
    return run / kind / str(json.loads((run / kind / "current").read_text())["version"])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(published_folder(run, "mllm") / "weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    return {(line.pop("phase"), line.pop("step")): line for line in lines}


# --- the same in a process of its own


def launched(launcher: str, run: Path, data: Path, *more: str) -> str:
    """`tpad distill` by two processes, as `accelerate launch` starts them with a file of configs/accelerate; its stderr."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / launcher)]
    command = [*launch, "--num_processes", "2", "--main_process_port", "0", "-m", "cli", "distill", "--run", str(run), "--data", str(data)]
    words = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "INFO"}
    done = subprocess.run(
        [sys.executable, *command, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
