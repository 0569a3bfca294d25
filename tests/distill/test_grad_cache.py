"""A step in chunks has the gradient of the whole batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from helpers.backbones import save_backbone
from helpers.processes import two_processes
from helpers.runs import PHASES, distill_run, losses, settings, weights
from pipeline.data.catalog import load_catalog
from pipeline.distill.grad_cache import backward, features, precompute_vision, split
from pipeline.mllm.backbone import build_backbone
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import FULL, Prompts
from pipeline.objectives.contrastive import info_nce

HEADS = {"items": ("knowledge",), "sessions": ("session",)}
ROWS = (3, 1, 4, 15, 9, 2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbones") / "qwen3_vl", "qwen3_vl")


def loss_of(out: dict[str, Tensor]) -> Tensor:
    return info_nce(out["sessions.session"], out["items.knowledge"], 1.0) + 0.1 * out["items.nll"]


@pytest.mark.parametrize("trains", ["everything", "adapters with dropout"])
def test_the_gradient_is_that_of_the_whole_batch(trains: str, folder: Path, tiny_data: Path) -> None:
    torch.set_num_threads(1)
    large = [f"backbone.name={folder}", "backbone.lora.rank=2", "backbone.lora.dropout=0.5"]
    config, catalog = settings(*(large if "dropout" in trains else [])), load_catalog(tiny_data)
    prompts = Prompts(catalog, config.data)
    backbone = build_backbone(config.backbone, prompts, 0)
    encoder, mllm = PromptProcessor(config.backbone, backbone, catalog), Mllm(backbone.model, ("knowledge", "session"), 8).train()
    sequences = {
        "sessions": [encoder.encode(prompts.session([row, row + 1])) for row in ROWS],
        "items": [encoder.encode(prompts.knowledge(row, FULL, np.random.default_rng(row))) for row in ROWS],
    }

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad for name, p in mllm.named_parameters() if p.grad is not None}
        mllm.zero_grad()
        return found

    chunks = [encoder.collate(part) for part in split(sequences, 4)]
    assert [{name: len(batch["input_ids"]) for name, batch in c.items() if name in HEADS} for c in chunks] == [
        *({"sessions": 4}, {"sessions": 3, "items": 1}, {"items": 4}, {"items": 2})
    ]
    seeds = list(range(len(chunks)))
    if "dropout" in trains:  # drawn a chunk, so the same chunks with a graph
        parts: dict[str, list[Tensor]] = {}
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)
            for name, part in mllm(chunk, HEADS).items():
                parts.setdefault(name, []).append(part)
        loss = loss_of({name: torch.cat(of) if of[0].ndim else torch.stack(of).sum() for name, of in parts.items()})
    else:
        loss = loss_of(mllm(encoder.collate(sequences), HEADS))
    loss.backward()
    whole = gradients()

    accelerator = Accelerator(cpu=True)
    if "dropout" in trains:
        precompute_vision(mllm, chunks, accelerator)
    leaves = features(mllm, chunks, HEADS, seeds)
    torch.testing.assert_close(loss_of(leaves), loss.detach(), rtol=1e-6, atol=0)
    backward(mllm, chunks, HEADS, seeds, loss_of(leaves), leaves, torch.zeros(()), accelerator)
    found = gradients()
    assert found.keys() == whole.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    scale = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * scale)


def test_chunks_and_processes_and_kept_pictures_leave_a_run_what_it_is(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    few = [f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=2", "batch=8")]
    whole = [f"backbone.name={folder}", "backbone.lora.rank=2", "backbone.lora.dropout=0.0", "distill.probe.every=0", *few]
    whole += ["distill.align.token_distill=100"]  # T has hardly left K yet
    distill_run(tmp_path / "whole", tiny_data, *whole)
    distill_run(tmp_path / "chunks", tiny_data, *whole, "distill.chunk=3")
    two_processes(distill_run, tmp_path / "two", tiny_data, *whole, "distill.chunk=3", "distill.vision_cache_gb=1")
    assert len(list((tmp_path / "two" / "vision").glob("*/*.safetensors"))) == 2  # each process kept its share
    for run in ("chunks", "two"):
        for name, weight in weights(tmp_path / "whole").items():
            # a tenth of a step: Adam makes a whole one of the least gradient, rounded or not
            torch.testing.assert_close(weights(tmp_path / run)[name], weight, atol=1e-4, rtol=0)
        for key, line in losses(tmp_path / "whole").items():
            assert losses(tmp_path / run)[key] == pytest.approx(line, abs=1e-4), key
