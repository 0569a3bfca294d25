"""Writes the unified MLLM as a folder of sentence-transformers: `tpad export-model`.

The folder has a Transformer (the backbone, its adapters merged), a Pooling, and a Router with one route for each half of the embedding:
LayerNorm, Dense and Normalize, which together are a head of `Mllm`. `SentenceTransformer(folder).encode(items)` gives k(v), and
`encode(items, task="transition")` gives p(v). Servers that take no more than Transformer and Pooling give the pooled states h(v).

The prompt around an item is part of the folder, so that an item is given as its text, its image, or both. With images it is the chat
template. A folder for texts alone has the language model without the vision tower, and its tokenizer adds the prompt to every text.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers, processors
from torch import Tensor, nn
from transformers import AutoProcessor

from pipeline.core.artifact import Version, environment, open_verified
from pipeline.core.config import BackboneConfig, DataConfig
from pipeline.core.errors import ENVIRONMENT, USAGE, UserError
from pipeline.core.files import read_json, remove, temporary_folder
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import HALVES
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.image_tokens import FAMILIES, BackboneProcessor, image_bounds
from pipeline.mllm.item_vectors import VECTORS
from pipeline.mllm.model import Mllm, embed, summed_states
from pipeline.mllm.processor import PromptProcessor, frame, turn
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.prompts import PromptPart, Prompts, View, filled
from pipeline.mllm.saved_mllm import HINT, load_mllm

SAMPLE = 16  # items on which the folder is compared with this package
LEAST_COSINE = 0.999
LONGEST = 4096  # tokens of a prompt up to which the states of the chat template's first tokens are taken out of the mean
LARGE = 1000.0  # factor of a state before the LayerNorm, so that its epsilon, which is meant for the state itself, does not count


def export_model(run: Path, data: Path, to: Path, text_only: bool) -> float:
    """Writes the MLLM of `run/mllm` to the new folder `to`. Raises `UserError`.

    Returns the least cosine between the vectors of items of `data` by the folder, loaded by sentence-transformers, and by this package.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Router, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed (tpad export-model); install the extra `export`", ENVIRONMENT) from None
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"something is there already ({to}); give --to a new folder", USAGE)
    version, settings, config = exportable(run)
    mllm, backbone, _ = load_mllm(version.path, config, merge=True)
    assert isinstance(mllm, Mllm)
    mllm.eval()
    templates, halves = Templates.model_validate(settings["templates"]), [half for half in HALVES if half in mllm.heads]
    catalog = load_catalog(data)
    prompts = Prompts(catalog, DataConfig.model_validate(settings["data"]).model_copy(update={"on_bad_image": "text_only"}), templates)
    items, ours = sample(mllm, PromptProcessor(config, backbone, catalog), prompts, text_only)
    width = mllm.backbone.config.get_text_config().hidden_size
    head, _ = frame(backbone.tokenizer)
    before = without_head(summed_states(mllm, head), len(head)) if head and config.pooling == "mean" else []
    routes: dict[str, Any] = {half: [*before, *dense_head(mllm.heads[half])] for half in halves}  # type: ignore[arg-type]
    to = to.absolute()
    with environment(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    with environment(to), temporary_folder(to.parent, f".{to.name}-") as temporary:
        base, whole = temporary / "model", temporary / "folder"
        save_base(backbone, version.path, templates, config, text_only, base)
        way = {"method": "forward", "method_output_name": "last_hidden_state"}
        message = {} if text_only else {"image": way, "message": way | {"format": "structured"}}
        transformer = Transformer(str(base), modality_config={"text": way, **message}, module_output_name="token_embeddings")  # type: ignore[arg-type]
        pooling = Pooling(width, {"last": "lasttoken", "mean": "mean"}[config.pooling])  # type: ignore[arg-type]
        modules = [transformer, pooling, Router(routes, default_route=halves[0])]
        SentenceTransformer(modules=modules).save(str(whole), create_model_card=False)
        types = whole / "modules.json"  # by the names of these modules that older versions and servers know too
        types.write_text(re.sub(r"sentence_transformers\.[\w.]+\.(\w+)\"", r'sentence_transformers.models.\1"', types.read_text()))
        (whole / "README.md").write_text(card(halves, text_only), encoding="utf-8")
        theirs = SentenceTransformer(str(whole), device="cpu", local_files_only=True)
        cosines = [(ours[half] * theirs.encode(items, task=half)).sum(1).min() for half in halves]  # type: ignore[call-overload]
        if not min(cosines) >= LEAST_COSINE:
            raise UserError(
                f"sentence-transformers would give other vectors, of cosine {min(cosines):.4f} (backbone.name = {config.name}); "
                "try --text-only, or another backbone",
                ENVIRONMENT,
            )
        remove(to)
        whole.rename(to)
    return float(min(cosines))


def exportable(run: Path) -> tuple[Version, dict[str, Any], BackboneConfig]:
    """Opens the MLLM of `run/mllm`: its version, settings and backbone. Raises `UserError` (2) if it is not one plain model."""
    version = open_verified(run / "mllm", "mllm", HINT)
    settings = read_json(version.path / "mllm.json")
    config = BackboneConfig.model_validate(settings["backbone"])
    fault = "the backbone `vectors` has no model" if config.name == VECTORS else ""
    fault = fault or ("it is two models" if settings.get("side_by_side") else "its weights have 4 bits" if config.quantize else "")
    if fault:
        raise UserError(f"this MLLM cannot be written for sentence-transformers: {fault} ({version.path}); distil another one", USAGE)
    return version, settings, config


def sample(mllm: Mllm, processor: PromptProcessor, prompts: Prompts, text_only: bool) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Returns up to `SAMPLE` items as sentence-transformers takes them and, by half, their vectors (n, D). Raises `UserError` (2).

    Longer texts than `backbone.max_text_tokens` are cut here and by a folder for texts; one with images cannot, so it shows none of them.
    """
    items: list[Any] = []
    sequences = []
    for row in range(min(len(prompts), 8 * SAMPLE)):
        text = prompts.text(row)
        cut = len(processor.tokens(" " + text)) > processor.config.max_text_tokens
        view = View(image=not text_only and prompts.has_image(row), text=bool(text) and (text_only or not cut))
        if (view.image or view.text) and len(items) < SAMPLE:
            sequences.append(processor.encode(prompts.item(row, view)))
            image = {"image": prompts.catalog.image(row)} if view.image else {}
            items.append((image | ({"text": text} if view.text else {})) if image else text)
    if not items:
        raise UserError(f"no item to compare the folder by ({prompts.catalog.path}); give --data one with shorter texts", USAGE)
    return items, embed(mllm, processor, sequences, [half for half in HALVES if half in mllm.heads], 4096, "cpu")


# --- the heads


def dense_head(head: nn.Sequential) -> list[nn.Module]:
    """Returns a head of `Mllm` as modules of sentence-transformers."""
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    norm, linear = head.children()
    assert isinstance(norm, nn.LayerNorm) and isinstance(linear, nn.Linear)
    layer_norm = LayerNorm(linear.in_features)
    layer_norm.norm.load_state_dict(norm.state_dict())
    dense = Dense(linear.in_features, linear.out_features, activation_function=nn.Identity())
    dense.linear.load_state_dict(linear.state_dict())
    return [layer_norm, dense, Normalize()]


def without_head(states: Tensor, count: int) -> list[nn.Module]:
    """Returns modules that take `count` tokens, whose states add up to `states` (d,), out of the mean over all n tokens.

    What remains of the sum, divided by n, is mean - states / n. It has the direction of the mean that `Mllm` takes, and a LayerNorm
    sees no more of it. There is no module that computes 1 / n. But a Pooling gives sums divided by n and by sqrt(n), which for a
    constant 1 beside the state are 1 and sqrt(n), and a piecewise linear function of sqrt(n) with a knot at every n is exact.
    """
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling

    width = len(states)
    tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    knots = torch.arange(count + 1, LONGEST + 1).double().sqrt()
    slopes = torch.diff(1 / knots**2) / torch.diff(knots)
    bends = torch.diff(slopes, prepend=torch.zeros(1, dtype=torch.float64))  # of relu(sqrt(n) - knot), beside the value at the first knot
    one = Dense(width, width + 1, activation_function=nn.Identity(), **tokens)
    pooling = Pooling(width + 1, ("mean", "mean_sqrt_len_tokens"))
    bent = Dense(2 * (width + 1), 2 * width + len(bends), activation_function=nn.ReLU())  # [mean, -mean, relu(sqrt(n) - knot)]
    out = Dense(2 * width + len(bends), width, activation_function=nn.Identity())
    with torch.no_grad():
        for dense in (one, bent, out):
            dense.linear.weight.zero_()
            dense.linear.bias.zero_()
        eye = torch.eye(width)
        one.linear.weight[:width], one.linear.bias[width] = eye, 1
        bent.linear.weight[:width, :width], bent.linear.weight[width : 2 * width, :width] = eye, -eye
        bent.linear.weight[2 * width :, -1], bent.linear.bias[2 * width :] = 1, -knots[:-1].float()
        out.linear.weight[:, : 2 * width] = LARGE * torch.cat([eye, -eye], 1)
        out.linear.weight[:, 2 * width :] = -LARGE * states[:, None] * bends.float()
        out.linear.bias.copy_(-LARGE * states / float(count + 1))
    return [one, pooling, bent, out]


# --- the model and the prompt


def save_base(backbone: Backbone, mllm: Path, templates: Templates, config: BackboneConfig, text_only: bool, folder: Path) -> None:
    """Writes model, and tokenizer or processor with the item's prompt. Raises `UserError` (5)."""
    parts = prompt_parts(templates)
    if text_only:
        backbone.model.get_decoder().save_pretrained(folder)
        save_text_tokenizer(backbone.tokenizer, parts, templates, config.max_text_tokens, folder)
        return
    try:
        processor = AutoProcessor.from_pretrained(mllm, trust_remote_code=False)
        processor.chat_template = chat_template(parts, templates, turn(backbone.tokenizer) or ("", ""), image_mark(processor, backbone))
    except (ImportError, ValueError, AttributeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise UserError(
            f"the processor of this family does not load: {reason[:200]} (tpad export-model); install what it names, or give --text-only",
            ENVIRONMENT,
        ) from None
    processor.image_processor = backbone.image_processor
    fit(processor, backbone.model.config)
    if FAMILIES[backbone.model.config.model_type].sized:
        of_family = BackboneProcessor(backbone.model.config, backbone.tokenizer, processor.image_processor, config.max_pixels)
        processor.image_processor.size = image_bounds(of_family)
    backbone.model.save_pretrained(folder)
    processor.save_pretrained(folder)


def prompt_parts(templates: Templates) -> list[PromptPart]:
    """Returns the parts of an item's prompt with both its image and its text."""
    item = filled(templates.item, image=[PromptPart("image")], text=[PromptPart("text")])
    return [*filled(templates.instruction), *filled(templates.describe, item=item)]


def save_text_tokenizer(tokenizer: Any, parts: list[PromptPart], templates: Templates, most: int, folder: Path) -> None:
    """Writes a tokenizer that cuts a text to `most` tokens and adds the prompt of an item without an image."""
    place = [part.kind for part in parts].index("text")

    def ids(some: Sequence[PromptPart]) -> list[int]:
        words = [inner for part in some for inner in (filled(templates.no_image) if part.kind == "image" else [part])]
        return [token for part in words for token in tokenizer(" " + part.text, add_special_tokens=False).input_ids]

    head, tail = frame(tokenizer)
    added = {"before": [*head, *ids(parts[:place])], "after": [*ids(parts[place + 1 :]), *tail]}
    added = {name: tokens for name, tokens in added.items() if tokens}
    backend = tokenizer.backend_tokenizer
    space = normalizers.Prepend(" ")
    backend.normalizer = space if backend.normalizer is None else normalizers.Sequence([space, backend.normalizer])
    single = [*(["before"] if "before" in added else []), "$A", *(["after"] if "after" in added else [])]
    special = [{"id": name, "ids": tokens, "tokens": tokenizer.convert_ids_to_tokens(tokens)} for name, tokens in added.items()]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)  # type: ignore[arg-type]
    tokenizer.chat_template = None
    tokenizer.model_max_length = most + sum(map(len, added.values()))
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True  # `<image>` in a text is no image
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)


def chat_template(parts: list[PromptPart], templates: Templates, around: tuple[str, str], image: str) -> str:
    """Returns the chat template, in Jinja: the prompt of an item with or without image and text, of one message."""

    def literal(text: str) -> str:
        return "{{ " + json.dumps(text) + " }}" if text else ""

    def words(template: str) -> str:
        return literal("".join(f" {part.text}" for part in filled(template)))

    shown = {
        "image": "{% if seen.image %}" + literal(image) + "{% else %}" + words(templates.no_image) + "{% endif %}",
        "text": "{% if seen.text %}{{ ' ' + seen.text }}{% else %}" + words(templates.no_text) + "{% endif %}",
    }
    read = (
        "{% set seen = namespace(image=false, text='') %}{% for message in messages %}{% if message.content is string %}"
        "{% set seen.text = message.content %}{% else %}{% for part in message.content %}{% if part.type == 'text' %}"
        "{% set seen.text = part.text %}{% else %}{% set seen.image = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    prompt = "".join(shown.get(part.kind) or literal(f" {part.text}") for part in parts)
    return read + literal(around[0]) + prompt + literal(around[1])


def fit(processor: Any, config: Any) -> None:
    """Tells the processor how many tokens an image has, which its own file says and the MLLM's folder does not hold."""
    vision = config.vision_config
    if hasattr(processor, "image_seq_len"):  # Idefics3, SmolVLM
        processor.image_processor.do_image_splitting = False
        processor.image_seq_len = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    if hasattr(processor, "image_seq_length"):  # Gemma 3
        processor.image_seq_length = config.mm_tokens_per_image
    if hasattr(processor, "num_additional_image_tokens"):  # LLaVA
        processor.patch_size, processor.vision_feature_select_strategy = vision.patch_size, config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(vision.model_type == "clip_vision_model")


def image_mark(processor: Any, backbone: Backbone) -> str:
    """Returns what stands for an image in the text that a family's processor is given."""
    config = backbone.model.config
    if config.model_type.startswith("qwen"):
        start, end = backbone.tokenizer.convert_ids_to_tokens([config.vision_start_token_id, config.vision_end_token_id])
        return f"{start}{processor.image_token}{end}"
    return str(processor.boi_token if config.model_type == "gemma3" else processor.image_token)


def card(halves: Sequence[str], text_only: bool) -> str:
    """Returns the README of a folder, in Markdown."""
    says = {"knowledge": "what the item is", "transition": "what people move on to from it"}
    lines = "\n".join(f'- `model.encode(items, task="{half}")`: {says[half]}' for half in halves)
    images = "texts" if text_only else 'texts, images, or both: `{"text": "a red mug", "image": Image.open("mug.jpg")}`'
    return f"""---
library_name: sentence-transformers
pipeline_tag: {"feature-extraction" if text_only else "image-feature-extraction"}
---

# Unified MLLM

Made by `tpad export-model` (TPAD, arXiv 2504.10538). Items are {images}. Without `task` it is the first of these vectors of length one:

{lines}

The prompt around an item is {"added by the tokenizer" if text_only else "the chat template"}: give the item alone.
"""
