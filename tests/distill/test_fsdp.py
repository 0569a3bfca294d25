"""A frozen backbone in pieces: two processes hold half of it each, and make what one process makes."""

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from helpers.backbones import save_backbone
from helpers.processes import kill_when, pair, two_processes
from helpers.runs import PHASES, distill_run, export_run, launched, losses, settings, weights
from pipeline.core.errors import USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.distill import fsdp
from pipeline.mllm.backbone import build_backbone
from pipeline.mllm.model import Mllm, embed
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what the launcher sets
LORA = ["backbone.lora.rank=2", "backbone.lora.dropout=0.0"]


# settings under which a process writes and follows a teacher too, in other numbers of batches than the other one
OPTIONS = ["distill.transfer.summary=1", "distill.transfer.summary_tokens=3", "distill.align.token_distill=0.5"]


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = save_backbone(tmp_path_factory.mktemp("backbones") / "qwen3_vl", "qwen3_vl")
    words = ["transfer.items=3", "chunk=5", *(f"{phase}.{setting}" for phase in PHASES for setting in ("steps=4", "lr=1e-4"))]
    return [f"backbone.name={folder}", *LORA, "export.token_budget=120", *(f"distill.{word}" for word in words)]


def in_pieces(run: Path, data: Path, *more: str) -> None:
    os.environ |= ASKED
    distill_run(run, data, *more)


@pytest.mark.parametrize("options", [(), pytest.param(OPTIONS, marks=pytest.mark.slow)])
def test_killed_and_resumed_in_pieces_a_run_is_what_one_process_makes(
    more: list[str], options: Sequence[str], tiny_data: Path, tmp_path: Path
) -> None:
    more = [*more, *options]
    alone, run = tmp_path / "alone", tmp_path / "run"
    distill_run(alone, tiny_data, *more)
    one, other = pair(in_pieces, run, tiny_data, *more)
    kill_when(one, (run / "distill" / "transfer" / "step-000002" / "state.json").exists)
    other.kill()
    other.join()
    assert not (run / "distill" / "transfer" / "step-000004").exists()
    said = launched("fsdp2.yaml", run, tiny_data, *more)
    assert "FSDP: each of 2 processes holds" in said
    expected, found = losses(alone), losses(run)
    assert found.keys() == expected.keys()
    for key in expected:
        assert all(abs(expected[key][name] - found[key][name]) < 1e-4 for name in expected[key]), key
    for name, weight in weights(alone).items():
        # Adam makes a whole step (1e-4) of the least gradient, so rounding alone can move a few numbers by a good part of one
        apart = (weights(run)[name] - weight).abs()
        assert apart.max() < 1e-4 and (apart > 3e-5).float().mean() < 0.01, name
    vectors = []
    for of in (alone, run):
        export_run(of, tiny_data, *more)
        vectors.append(read_embeddings(of / "embeddings"))
    for half in ("knowledge", "transition"):
        np.testing.assert_allclose(getattr(vectors[1], half), getattr(vectors[0], half), atol=1e-3)


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def hold_half(data: Path, *more: str) -> None:
    config, catalog, accelerator = settings(*more), load_catalog(data), Accelerator()
    prompts = Prompts(catalog, config.data)
    backbone = build_backbone(config.backbone, prompts, 0)
    mllm, encoder = Mllm(backbone.model, ("knowledge",), 8).eval(), PromptProcessor(config.backbone, backbone, catalog)
    sequences = [encoder.encode(prompts.item(row)) for row in range(8)]

    def embedded() -> np.ndarray:
        return embed(mllm, encoder, sequences, ("knowledge",), 100, accelerator.device)["knowledge"]

    before, whole = held(), embedded()
    frozen = sum(p.nbytes for p in backbone.model.get_decoder().layers.parameters() if not p.requires_grad)
    fsdp.shard(backbone.model, accelerator.device, 2)
    for _ in range(2):
        assert abs((before - held()) / frozen - 0.5) < 0.02
        np.testing.assert_array_equal(embedded(), whole)


def test_each_process_holds_half_of_the_frozen_layers_before_and_after_a_pass(more: list[str], tiny_data: Path) -> None:
    two_processes(hold_half, tiny_data, *more)


@pytest.mark.parametrize(
    ("flags", "more", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], r"DeepSpeed is not supported .*fsdp2\.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], r"Megatron-LM is not supported .*fsdp2\.yaml"),
        ({"ACCELERATE_USE_FSDP": "true"}, LORA, r"FSDP 1 is not supported .*fsdp2\.yaml"),
        (ASKED, [], r"backbone\.lora = null.*ddp\.yaml"),
        (ASKED, [*LORA, "backbone.quantize=nf4"], r"backbone\.quantize = nf4.*ddp\.yaml"),
        (ASKED, [*LORA, "distill.variant=merge"], r"distill\.variant = merge.*ddp\.yaml"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(
    flags: dict[str, str], more: list[str], says: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag, value in flags.items():
        monkeypatch.setenv(flag, value)
    with pytest.raises(UserError, match=says) as error:
        distill_run(tmp_path, tiny_data, *more)
    assert error.value.code == USAGE
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
