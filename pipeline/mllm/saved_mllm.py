"""Saves and loads a multimodal LLM, and merges its adapters."""

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from pipeline.core.artifact import decoding
from pipeline.core.config import BackboneConfig
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import read_json, write_json
from pipeline.data.catalog import Catalog
from pipeline.mllm.backbone import Backbone, adapted, folder_sha256, from_config, published_backbone, vector_backbone
from pipeline.mllm.item_vectors import VECTORS
from pipeline.mllm.model import Mllm, SideBySide, load_trainable, trainable_state

HINT = "run `tpad distill` first"
BASE = "base.safetensors"  # the weights under the adapters of the tiny backbone


def save_mllm(folder: Path, model: Mllm | SideBySide, backbone: Backbone, settings: dict[str, Any]) -> None:
    """Writes the trained weights, the backbone's config, tokenizer and image processor, and `settings` to build it again."""
    backbone.model.config.save_pretrained(folder)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(folder)
        backbone.image_processor.save_pretrained(folder)
    save_file({name: p.detach().cpu().contiguous() for name, p in trainable_state(model).items()}, folder / "weights.safetensors")
    if backbone.drawn:
        save_file({name: weight.cpu().contiguous() for name, weight in backbone.drawn.items()}, folder / BASE)
    write_json(folder / "mllm.json", settings | {"frozen_sha256": backbone.frozen_sha256})


def load_mllm(
    folder: Path, config: BackboneConfig | None = None, merge: bool = False, catalog: Catalog | None = None
) -> tuple[Mllm | SideBySide, Backbone, dict[str, Any]]:
    """Loads what `save_mllm` wrote, whose files must have been verified: model, backbone, settings. Raises `UserError` (4).

    `config` overrides settings of the backbone on which no weight depends. `merge` adds the adapters into the weights they adapt:
    the same model, for inference only. A backbone of vectors takes those of the items of `catalog`.
    """
    with decoding(folder, HINT):
        return _load(folder, config, merge, catalog)


def _load(
    folder: Path, config: BackboneConfig | None, merge: bool, catalog: Catalog | None
) -> tuple[Mllm | SideBySide, Backbone, dict[str, Any]]:
    settings = read_json(folder / "mllm.json")
    config = config or BackboneConfig.model_validate(settings["backbone"])
    if (known := settings.get("backbone_sha256")) and known != folder_sha256(config):
        raise _other_base(config)
    backbone = _saved_backbone(folder, config, catalog)
    if (frozen := settings.get("frozen_sha256")) and backbone.frozen_sha256 and frozen != backbone.frozen_sha256:
        raise _other_base(config)
    mllm: Mllm | SideBySide
    if settings.get("side_by_side"):
        other = _saved_backbone(folder, config, catalog)
        models = zip(settings["heads"], (backbone, other), strict=True)
        mllm = SideBySide({half: Mllm(part.model, [half], settings["dim"]) for half, part in models})
    else:
        mllm = Mllm(backbone.model, settings["heads"], settings["dim"])
    load_trainable(mllm, load_file(folder / "weights.safetensors"), str(folder / "weights.safetensors"))
    if merge and not config.quantize:  # weights in 4 bits would round them
        merge_adapters(mllm)
    return mllm, backbone, settings


def _saved_backbone(folder: Path, config: BackboneConfig, catalog: Catalog | None) -> Backbone:
    """Builds the backbone as before training, with empty adapters."""
    if config.name == VECTORS:
        assert catalog is not None, "vectors are those of a catalogue"
        return vector_backbone(config, catalog)
    if config.name != "tiny":
        return adapted(published_backbone(config), config)
    # code that a config names is never run, nor asked about
    model = from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), config)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if config.lora is not None:
        load_trainable(model, load_file(folder / BASE), str(folder / BASE))
    return adapted(Backbone(model, tokenizer, processor), config)


def _other_base(config: BackboneConfig) -> UserError:
    fault = "the backbone is not the one the MLLM was distilled on"
    return UserError(f"{fault} (backbone.name = {config.name}); put it back, or run `tpad distill` again", ARTIFACT)


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter into the weight it adapts, in place: the same model, faster."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
