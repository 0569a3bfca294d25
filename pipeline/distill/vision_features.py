"""Runs a frozen vision tower over every image of the catalogue before training (`distill.vision_cache_gb`)."""

import sys
from pathlib import Path

import numpy as np

from pipeline.core.config import Config
from pipeline.distill.process_group import Group
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.processor import Encoder
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.vision_cache import Cache
from pipeline.mllm.vision_tower import Picture, is_frozen


def precompute_vision(config: Config, run: Path, backbone: Backbone, views: Prompts, encoder: Encoder, group: Group) -> None:
    """Fills the vision cache of the run, each process with its share of the images, and lets `encoder` read from it."""
    if not is_frozen(backbone.model):
        if group.rank == 0:
            print("note: the vision tower trains, so its output is not cached (distill.vision_cache_gb)", file=sys.stderr)
        return
    cache = encoder.kept = Cache(run / "vision", backbone, config.backbone.max_pixels)
    loader = Encoder(config.backbone, backbone, encoder.catalog, cache_bytes=0)
    rows = group.share(np.array([row for row in range(len(views)) if encoder.catalog.has_image(row)], np.int64))
    if group.rank == 0:
        cache.clear_others()
    group.accelerator.wait_for_everyone()
    free_bytes = (int(config.distill.vision_cache_gb * 1e9) - cache.size()) // group.world

    def load(row: int) -> Picture | None:
        return None if not views.has_image(row) or loader.key(row) in cache else loader.picture(row)

    if config.backbone.quantize is None:  # a quantized model is on the device already
        backbone.model.to(group.accelerator.device)
    cache.fill(backbone.model.eval(), load, rows, encoder.family.stack, free_bytes, config.distill.workers, group.rank == 0)
    group.accelerator.wait_for_everyone()
    cache.refresh()
