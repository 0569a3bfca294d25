"""A shop of forty items, settings that distil it in seconds on one core, and random backbones of other families."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tiny import FORK
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from cli import open_teacher
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import UserError as UserError
from pipeline.distill.distill import distill
from pipeline.export.export import export

ROOT = Path(__file__).parents[1]
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
    """The data folder with other pictures (bytes, or the path of a file) and titles in some rows."""
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


def start(work: Callable[..., object], *args: object) -> BaseProcess:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def member(rank: int, port: int, work: Callable[..., object], *args: object) -> None:
    """`work` as one of two processes that know of each other."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    work(*args)


def pair(work: Callable[..., object], *args: object) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(member, rank, port, work, *args) for rank in range(2)]


def two_processes(work: Callable[..., object], *args: object) -> None:
    for process in pair(work, *args):
        process.join(600)
        assert process.exitcode == 0


def kill_when(process: BaseProcess, reached: Callable[[], bool]) -> None:
    """SIGKILL as soon as it is so."""
    deadline = time.monotonic() + 600
    while not reached() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


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


# --- backbones as a user would have them: a local folder, here with random weights

FAMILIES = ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "llava_onevision")
SIDE = 24  # pixels a side of a picture, where all have the same


def save_backbone(folder: Path, family: str) -> Path:
    """A random model of under a million parameters, with its tokenizer and image processor."""
    special = ["<|pad|>", "<|end|>", "<image>", "<fake_token_around_image>", "<global-img>", "<|vision_start|>", "<|vision_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([" Item: a mug."], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1], extra_special_tokens=special[2:])
    if family == "qwen3_vl":
        tokenizer.chat_template = (
            "{% for m in messages %}<|end|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|end|>{% endfor %}assistant\n"
        )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(family, tokenizer))
    if family == "gemma3":  # begins as zeros, which no trained model has: it would see nothing
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    for part in (model, tokenizer, _image_processor(family)):
        part.save_pretrained(folder)
    return folder


def _image_processor(family: str) -> Any:
    square, longest = {"height": SIDE, "width": SIDE}, {"longest_edge": SIDE}
    if family == "gemma3":
        return Gemma3ImageProcessorPil(size=square)
    if family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    if family == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]])
    if family.startswith("qwen"):
        return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return Idefics3ImageProcessorPil(size=longest, max_image_size=longest, do_image_splitting=False)


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    image, start, end = tokenizer.convert_tokens_to_ids(["<image>", "<|vision_start|>", "<|vision_end|>"])
    text: dict[str, Any] = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id},
    }
    if family.startswith("qwen"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2} | {
            "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            "qwen2_5_vl": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "qwen3_vl": {
                **{"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 64},
                "deepstack_visual_indexes": [0],
            },
        }[family]
        kind = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family]
        text |= {"rope_parameters": rope} | ({"head_dim": 16} if family == "qwen3_vl" else {})
        return kind(text_config=text, vision_config=vision, image_token_id=image, vision_start_token_id=start, vision_end_token_id=end)
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": SIDE, "patch_size": 6},
    }
    if family == "gemma3":
        text |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        marks = {"boi_token_index": start, "eoi_token_index": end, "image_token_index": image}
        return Gemma3Config(text_config=text, vision_config=vision | {"vision_use_head": False}, mm_tokens_per_image=4, **marks)
    if family == "llava":
        vision |= {"model_type": "clip_vision_model"}
        return LlavaConfig(text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_index=image)
    if family == "llava_onevision":
        return LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
            image_token_index=image,
        )
    kind = {"idefics3": Idefics3Config, "smolvlm": SmolVLMConfig}[family]
    return kind(text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_id=image, scale_factor=2, pad_token_id=0)
