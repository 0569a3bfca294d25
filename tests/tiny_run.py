"""A shop of forty items, settings that distil it in seconds on one core, and random backbones of other families."""

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3ImageProcessorPil,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from pipeline.config import Config, load_config
from pipeline.distill import distill
from pipeline.errors import UserError as UserError
from pipeline.export import export

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


def distill_run(run: Path, data: Path, *more: str) -> bool:
    torch.set_num_threads(1)
    return distill(settings(*more), run, data)


def export_run(run: Path, data: Path, *more: str) -> None:
    torch.set_num_threads(1)
    export(settings(*more), run, data)


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

_FORK = multiprocessing.get_context("forkserver")  # its children start with everything imported, and die like any process
_FORK.set_forkserver_preload(["tiny_run"])


def start(work: Callable[..., object], *args: object) -> BaseProcess:
    process = _FORK.Process(target=work, args=args)
    process.start()
    return process


def kill_when(process: BaseProcess, reached: Callable[[], bool]) -> None:
    """SIGKILL as soon as it is so."""
    deadline = time.monotonic() + 600
    while not reached() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


# --- backbones as a user would have them: a local folder, here with random weights


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
        image_processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    else:
        side = {"longest_edge": 24}
        image_processor = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(family, tokenizer))
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    return folder


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    image, start, end = tokenizer.convert_tokens_to_ids(["<image>", "<|vision_start|>", "<|vision_end|>"])
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id},
    }
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        vision = {
            **{"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2},
            **{"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        }
        return Qwen3VLConfig(
            text_config=text | {"head_dim": 16, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=image,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 6,
    }
    return SmolVLMConfig(
        text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_id=image, scale_factor=2, pad_token_id=0
    )
