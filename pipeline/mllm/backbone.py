"""Loads or builds the backbone: a model, its tokenizer and its image processor, with adapters where `backbone.lora` is set.

It is any Hugging Face image-text-to-text model of a family in `image_tokens.py`, or the built-in tiny Idefics3, drawn at random and
trained in full. Tokenizer and image processor are loaded separately, since processors with a video part need torchvision.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import cached_file

from pipeline.core.config import BackboneConfig
from pipeline.core.errors import ENVIRONMENT, USAGE, UserError
from pipeline.core.files import environment_error, sha256_file
from pipeline.data.catalog import Catalog
from pipeline.mllm.item_vectors import VECTORS, ItemVectors, VectorModel
from pipeline.mllm.kernels import fuse
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.tiny_backbone import tiny_config, tiny_processor, train_tokenizer

SAMPLED = 4096
MODEL_FILES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
UNQUANTIZED = ["lm_head", r"model\.(visual|vision_model|vision_tower|connector|multi_modal_projector)"]  # prefixes of module names


@dataclass(frozen=True)
class Backbone:
    """A model with the two halves of its processor."""

    model: Any  # a Hugging Face ...ForConditionalGeneration
    tokenizer: Any
    image_processor: Any
    frozen_sha256: str | None = None  # identifies the weights under the adapters; None: every weight is published, or quantized
    drawn: Mapping[str, torch.Tensor] = field(default_factory=dict)  # weights under adapters that nobody else has: of the tiny one


def build_backbone(config: BackboneConfig, prompts: Prompts, seed: int) -> Backbone:
    """Builds the backbone as training starts from it: the tiny one drawn from `seed`, any other with its published weights."""
    torch.manual_seed(seed)
    if config.name == VECTORS:
        return vector_backbone(config, prompts.catalog)
    if config.name == "tiny":
        tokenizer = train_tokenizer(config.tiny.vocab, prompts.words())
        backbone = Backbone(from_config(tiny_config(config.tiny, tokenizer), config), tokenizer, tiny_processor(config.tiny))
    else:
        backbone = published_backbone(config)
    return adapted(backbone, config)


def vector_backbone(config: BackboneConfig, catalog: Catalog) -> Backbone:
    """Reads the table of vectors of a catalogue's items as a backbone without weights. Raises `UserError` (2 or 3)."""
    return Backbone(VectorModel(ItemVectors(config, catalog)), None, None)


def adapted(backbone: Backbone, config: BackboneConfig) -> Backbone:
    """Adds LoRA adapters (fp32) to the language model and freezes the rest; without `lora`, every weight trains."""
    if config.lora is not None:
        drawn = {name: weight.detach().clone() for name, weight in backbone.model.named_parameters()} if config.name == "tiny" else {}
        unknown = config.quantize or next(backbone.model.parameters()).is_meta  # a model without weights, to count its memory
        backbone = replace(backbone, frozen_sha256=None if unknown else sampled_sha256(backbone.model), drawn=drawn)
        targets = _targets(backbone.model, config.lora.targets)
        backbone.model.requires_grad_(False)
        lora = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout, target_modules=targets)
        inject_adapter_in_model(lora, backbone.model)
        cast_adapter_dtype(backbone.model, "default")  # small steps are lost in bf16
    if config.gradient_checkpointing:
        backbone.model.activation_checkpointing_enable({"use_reentrant": False})
    return backbone


def _targets(model: Any, pattern: str) -> list[str]:
    """Returns the linear layers whose names match `pattern`. Raises `UserError` (2) if none does, or one outside the language model."""
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder()) + "."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if re.fullmatch(pattern, name)]
    where = f"backbone.lora.targets = {pattern!r}"
    if outside := [name for name in matched if not name.startswith(decoder)]:
        listed = f"`{outside[0]}`" + f" and {len(outside) - 1} more" * (len(outside) > 1)
        raise UserError(f"{listed} would have adapters outside the language model `{decoder}*` ({where}); narrow it", USAGE)
    if not matched:
        known = next(name for name in linear if name.startswith(decoder))
        raise UserError(f"no linear layer of the language model has such a name ({where}); it has e.g. `{known}`", USAGE)
    return matched


def published_backbone(config: BackboneConfig) -> Backbone:
    """Loads a published model from safetensors. Raises `UserError` (5)."""
    name, revision = config.name, config.revision
    if _weights(config, "*.bin") and not _weights(config, "*.safetensors"):
        raise UserError(f"no weights in safetensors, and pickles are not read (backbone.name = {name}); save the model again", ENVIRONMENT)
    more = {"quantization_config": _nf4(config), "device_map": {"": PartialState().local_process_index}} if config.quantize else {}
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            trust_remote_code=False,
            **more,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        tokenizer.chat_template = _processor_template(config) or tokenizer.chat_template
        # the PIL variant everywhere, so that an image gives the same pixels with and without torchvision
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil", trust_remote_code=False)
    except ImportError as error:
        raise _lacking(error, config) from None
    except Exception as error:  # of any kind: a damaged folder makes transformers raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise environment_error(error, Path(name)) or UserError(
            f"cannot load the backbone: {reason} (backbone.name = {name}); give a local folder or a reachable name", ENVIRONMENT
        ) from None
    fuse(model, config)
    return Backbone(model, tokenizer, image_processor)


def sampled_sha256(model: nn.Module) -> str:
    """Hashes up to `SAMPLED` numbers of every weight, evenly spaced: another model differs in some, and terabytes need not be read."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()
        sample = numbers[:: max(1, len(numbers) // SAMPLED)].cpu().contiguous().view(torch.uint8).numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {hashlib.sha256(sample.tobytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def folder_sha256(config: BackboneConfig) -> str | None:
    """Hashes the files of a local folder that decide what its model computes, since they may be replaced: weights, settings, tokenizer.

    None for the tiny one and for a name on the hub, which `revision` pins.
    """
    if config.name in ("tiny", VECTORS) or not Path(config.name).is_dir():
        return None
    paths = sorted(path for path in Path(config.name).iterdir() if path.suffix in MODEL_FILES and path.is_file())
    return hashlib.sha256("".join(f"{path.name} {sha256_file(path)}\n" for path in paths).encode()).hexdigest()


def _weights(config: BackboneConfig, pattern: str) -> list[Path]:
    """Returns the files of a local folder that match `pattern`; none for a name on the hub."""
    return sorted(Path(config.name).glob(pattern))


def _processor_template(config: BackboneConfig) -> str | None:
    """Returns the chat template of the model's processor if it is in a separate file, which tokenizers do not read."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(config.name, "chat_template.json", revision=config.revision, **quiet)
    return None if path is None else str(json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"])


def _nf4(config: BackboneConfig) -> BitsAndBytesConfig:
    """Returns the settings of QLoRA (arXiv 2305.14314): linear layers in 4 bits, except vision tower, connector and output layer.

    Raises `UserError` (2 or 5).
    """
    if config.lora is None:
        raise UserError("weights of 4 bits cannot be trained (backbone.quantize); set backbone.lora, or no quantize", USAGE)
    if not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        raise UserError("4 bits need a GPU and bitsandbytes (backbone.quantize); install the extra `qlora`, or set it to null", ENVIRONMENT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=UNQUANTIZED,
    )


def from_config(hf_config: PretrainedConfig, config: BackboneConfig) -> Any:
    """Builds the model of a Hugging Face config, with random weights."""
    try:
        return AutoModelForImageTextToText.from_config(
            hf_config, dtype=getattr(torch, config.dtype), attn_implementation=config.attention, trust_remote_code=False
        )
    except ImportError as error:
        raise _lacking(error, config) from None


def _lacking(error: ImportError, config: BackboneConfig) -> UserError:
    way_out = ", or take sdpa (backbone.attention)" if config.attention == "flash_attention_2" else f" (backbone.name = {config.name})"
    return UserError(f"a package is missing: {str(error).splitlines()[0]}; install it{way_out}", ENVIRONMENT)
