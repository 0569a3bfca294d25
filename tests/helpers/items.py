"""Builds six items whose images and texts differ in one property each, and an MLLM with its prompts."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.runs import TINY
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.data.catalog import load_catalog
from pipeline.mllm.backbone import Backbone, build_backbone
from pipeline.mllm.model import Mllm, embed
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import Prompts

LONG = "a very large mug of clay with a handle, a lid, a saucer and a spoon"
ITEMS: dict[str, tuple[str, str, str | None]] = {  # item_id -> title, material, colour of the image
    "red": ("a mug", "clay", "red"),
    "blue": ("a mug", "clay", "blue"),
    "no-image": ("a mug", "clay", None),
    "no-text": ("", "", "red"),
    "long": (LONG, "glass", "green"),
    "red-again": ("a mug", "clay", "red"),
}
ROW = {item_id: row for row, item_id in enumerate(ITEMS)}


def image_of(colour: str | None) -> dict[str, bytes | None] | None:
    if colour is None:
        return None
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@dataclass(frozen=True)
class Setup:
    config: Config
    prompts: Prompts
    backbone: Backbone
    processor: PromptProcessor
    mllm: Mllm

    def features(self, sequences: Sequence[Encoded], token_budget: int, head: str = "knowledge") -> np.ndarray:
        return embed(self.mllm.eval(), self.processor, sequences, (head,), token_budget, "cpu")[head]

    def items(self, *item_ids: str) -> list[Encoded]:
        return [self.processor.encode(self.prompts.item(ROW[item_id])) for item_id in item_ids]


def make(data: Path, folders: Path, family: str, *more: str) -> Setup:
    name = [] if family == "tiny" else [f"backbone.name={folders / family}", "backbone.lora.rank=2", "backbone.lora.dropout=0.0"]
    config = load_config(None, [*TINY, *name, *more])
    catalog = load_catalog(data)
    prompts = Prompts(catalog, config.data)
    backbone = build_backbone(config.backbone, prompts, config.seed)
    torch.manual_seed(1)
    mllm = Mllm(backbone.model, ("knowledge", "transition"), 8)
    return Setup(config, prompts, backbone, PromptProcessor(config.backbone, backbone, catalog), mllm)
