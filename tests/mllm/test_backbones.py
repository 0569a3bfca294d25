"""Tests published backbones: each family against its own processor, adapters, precision, and runs by one and two processes."""

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, Gemma3Processor, Idefics3Processor, LlavaProcessor
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks import memory
from helpers.backbones import FAMILIES, save_backbone
from helpers.items import ITEMS, ROW, Setup, image_of, make
from helpers.processes import contents, two_processes
from helpers.runs import PHASES, distill_run, export_run, losses, settings, weights
from pipeline.core.artifact import OWN_KEYS, open_verified, stage
from pipeline.core.config import BackboneConfig
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, ENVIRONMENT, USAGE, UserError
from pipeline.core.files import write_json
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.mllm import image_tokens
from pipeline.mllm.backbone import UNQUANTIZED, build_backbone, published_backbone
from pipeline.mllm.model import trainable_state
from pipeline.mllm.processor import Encoded
from pipeline.mllm.prompts import PromptPart, Prompts
from pipeline.mllm.saved_mllm import load_mllm
from pipeline.mllm.vision_tower import pack_attention

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_of_the_language_model_and_heads_train(data: Path, folders: Path, family: str) -> None:
    setup = make(data, folders, family)
    decoder = setup.backbone.model.get_decoder()
    adapted = {name for name, module in decoder.named_modules() if hasattr(module, "lora_A")}
    linear = {name.removesuffix(".base_layer") for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    assert adapted == {name for name in linear if "lora_" not in name}
    names = set(trainable_state(setup.mllm))
    inside = {name for name, p in setup.mllm.named_parameters() if any(p is q for q in decoder.parameters())}
    assert {name for name in names if not name.startswith("heads.")} == {name for name in inside if "lora_" in name}

    before = {name: tensor.clone() for name, tensor in setup.mllm.state_dict().items()}
    optimizer = torch.optim.AdamW(setup.mllm.parameters(), 1e-2)
    setup.mllm.train()
    for _ in range(2):  # A changes once B is no longer zero
        sequences = [setup.processor.encode([*setup.prompts.item(row), PromptPart("answer", "clay")]) for row in ROW.values()]
        out = setup.mllm(setup.processor.collate({"items": sequences}), {"items": ("knowledge", "transition")})
        optimizer.zero_grad()
        (out["items.nll"] + out["items.knowledge"].sum() + out["items.transition"].sum()).backward()
        optimizer.step()
    changed = {name for name, tensor in setup.mllm.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == names


@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl"])
def test_adapters_outside_the_language_model_are_refused_by_name(data: Path, folders: Path, family: str) -> None:
    for pattern, named in [
        (r".*\.q_proj|.*\.qkv", "vision|visual"),
        (".*", "vision|visual"),
        ("lm_head", "`lm_head`"),
        (r"q_proj", r"e\.g\. `model\."),
        (r"model\.(language|text)_model", r"e\.g\. `model\."),
    ]:
        with pytest.raises(UserError, match=named) as error:
            make(data, folders, family, f"backbone.lora.targets='{pattern}'")
        assert error.value.code == USAGE and "backbone.lora.targets" in str(error.value)


def test_adapters_can_be_on_fewer_layers(data: Path, folders: Path) -> None:
    setup = make(data, folders, "gemma3", r"backbone.lora.targets='model\.language_model\.layers\.1\..*\.[qv]_proj'")
    adapted = {name.split(".lora_")[0] for name in trainable_state(setup.backbone.model)}
    assert adapted == {f"model.language_model.layers.1.self_attn.{name}_proj" for name in "qv"}


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_are_for_the_language_model_alone(data: Path, folders: Path, family: str) -> None:
    setup = make(data, folders, family)
    decoder = {id(module) for module in setup.backbone.model.get_decoder().modules()}
    linear = [(name, module) for name, module in setup.backbone.model.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name, _ in linear if should_convert_module(name, UNQUANTIZED)} == {name for name, m in linear if id(m) in decoder}


def test_four_bits_without_a_gpu_is_one_clear_line(data: Path, folders: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"backbone\.quantize") as error:
        make(data, folders, "smolvlm", "backbone.quantize=nf4")
    assert error.value.code == ENVIRONMENT


def test_in_bf16_adapters_and_heads_stay_fp32_and_features_stay_near(data: Path, folders: Path, tiny_data: Path, tmp_path: Path) -> None:
    full, half = make(data, folders, "gemma3"), make(data, folders, "gemma3", "backbone.dtype=bfloat16")
    assert {p.dtype for p in half.backbone.model.get_decoder().parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in trainable_state(half.mllm).values()} == {torch.float32}
    cosine = (full.features(full.items(*ITEMS), 10_000) * half.features(half.items(*ITEMS), 10_000)).sum(1)
    assert cosine.min() > 0.999
    more = [*FEW, f"backbone.name={folders / 'gemma3'}", "backbone.dtype=bfloat16"]
    assert distill_run(tmp_path, tiny_data, *more)
    export_run(tmp_path, tiny_data, *more)
    exported = read_embeddings(tmp_path / "embeddings")
    np.testing.assert_allclose(np.linalg.norm(exported.transition, axis=1), 1, atol=1e-5)


FEW = [f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=2", "batch=4")]
FEW += ["backbone.gradient_checkpointing=true", "backbone.lora.rank=2", "backbone.lora.dropout=0.0"]
# where nothing is withheld k(v) stays as it is, and Adam would make steps of the rounding that is left of its gradient
FEW += ["distill.align.withhold_text=0.5", "distill.align.withhold_image=0.4"]


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) == set(image_tokens.FAMILIES)


@pytest.fixture(scope="module")
def distilled(folders: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family, by one process."""
    root = tmp_path_factory.mktemp("distilled")
    for family in FAMILIES:
        assert distill_run(root / family, tiny_data, *FEW, f"backbone.name={folders / family}")
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_backbone_is_distilled_and_exported(family: str, folders: Path, distilled: Path, tiny_data: Path) -> None:
    run = distilled / family
    adapters = {name: w for name, w in weights(run).items() if "lora_B" in name}
    assert adapters
    assert all(w.any() for w in adapters.values())  # they start at zero
    assert not [name for name in weights(run) if "lora_" not in name and not name.startswith("heads.")]
    export_run(run, tiny_data, *FEW, f"backbone.name={folders / family}")
    exported = read_embeddings(run / "embeddings")
    assert exported.knowledge.shape == exported.transition.shape == (40, 16)
    assert len(np.unique(exported.knowledge.round(5), axis=0)) > 30
    assert str(run.parent.parent) not in (exported.version.path / "manifest.json").read_text()
    assert exported.version.manifest["backbone"] == family


ALIKE = {"idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "llava"}  # families that distribute like another one


@pytest.mark.parametrize("family", [pytest.param(family, marks=[pytest.mark.slow] * (family in ALIKE)) for family in FAMILIES])
def test_two_processes_distil_a_local_backbone_as_one(family: str, folders: Path, distilled: Path, tiny_data: Path, tmp_path: Path) -> None:
    two_processes(distill_run, tmp_path, tiny_data, *FEW, f"backbone.name={folders / family}")
    one, two = losses(distilled / family), losses(tmp_path)
    assert all(abs(two[step]["loss"] - losses["loss"]) < 1e-3 for step, losses in one.items())
    for name, weight in weights(distilled / family).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, atol=2e-3, rtol=0)


def test_a_backbone_that_is_gone_is_one_clear_line(tiny_data: Path, tmp_path: Path) -> None:
    prompts = Prompts(load_catalog(tiny_data), load_config().data)
    pickled = save_backbone(tmp_path / "pickled", "smolvlm")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for folder, says in ((tmp_path / "nothing", "cannot load the backbone"), (pickled, "pickles are not read")):
        with pytest.raises(UserError, match=rf"{says}.*backbone\.name") as error:
            build_backbone(load_config(None, [f"backbone.name={folder}"]).backbone, prompts, 0)
        assert error.value.code == ENVIRONMENT


def test_other_weights_under_the_name_of_the_backbone_are_noticed(tiny_data: Path, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone", "smolvlm")
    few = [f"backbone.name={folder}", "backbone.lora.rank=2", *(f"distill.{phase}.steps=1" for phase in PHASES)]
    distill_run(tmp_path / "run", tiny_data, *few)
    assert not distill_run(tmp_path / "run", tiny_data, *few)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="not the one the MLLM was distilled on") as error:
        export_run(tmp_path / "run", tiny_data, *few)
    assert error.value.code == ARTIFACT
    forget_files_of_the_backbone(tmp_path / "run")  # as of a name on the hub
    with pytest.raises(UserError, match="not the one the MLLM was distilled on") as error:
        export_run(tmp_path / "run", tiny_data, *few)
    assert error.value.code == ARTIFACT
    with pytest.raises(UserError, match="other settings or data"):  # no trained weights are thrown away
        distill_run(tmp_path / "run", tiny_data, *few)


def forget_files_of_the_backbone(run: Path) -> None:
    before = open_verified(run / "mllm", "mllm", "")
    with stage(run / "mllm", "mllm") as staging:
        shutil.copytree(before.path, staging.path, dirs_exist_ok=True)
        mllm = json.loads((staging.path / "mllm.json").read_text())
        assert mllm["backbone_sha256"] and mllm["frozen_sha256"]
        write_json(staging.path / "mllm.json", mllm | {"backbone_sha256": None})
        staging.publish({key: value for key, value in before.manifest.items() if key not in OWN_KEYS})


def test_adapters_are_exported_on_the_weights_they_were_trained_on(tiny_data: Path, tmp_path: Path) -> None:
    few = ["backbone.lora.rank=2", *(f"distill.{phase}.steps=1" for phase in PHASES)]
    distill_run(tmp_path / "run", tiny_data, *few)
    folder = open_verified(tmp_path / "run" / "mllm", "mllm", "").path
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for run, seed in (("run", 5), ("again", 6)):
        torch.manual_seed(seed)  # of whatever else the process has drawn
        export_run(tmp_path / run, tiny_data, *few)
    assert contents(tmp_path / "run" / "embeddings") == contents(tmp_path / "again" / "embeddings")
    config = settings(*few).backbone
    trained = build_backbone(config, Prompts(load_catalog(tiny_data), settings(*few).data), 0)
    loaded = load_mllm(folder)[1]
    assert loaded.frozen_sha256 == trained.frozen_sha256
    frozen = {name: weight for name, weight in trained.model.named_parameters() if not weight.requires_grad}
    assert len(frozen) > 20
    assert all(torch.equal(dict(loaded.model.named_parameters())[name], weight) for name, weight in frozen.items())


def test_an_unknown_family_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    folder = save_backbone(tmp_path / "paligemma", "smolvlm")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**small, image_size=16, patch_size=8), text_config=GemmaConfig(**small, vocab_size=300, head_dim=8)
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    with pytest.raises(UserError, match="`paligemma` is not supported") as error:
        make(data, tmp_path, "paligemma")
    assert error.value.code == USAGE


# --- equal to the family's processor


def own_processor(setup: Setup, family: str) -> Any:
    """Returns the processor of a family that does not need torchvision."""
    backbone, config = setup.backbone, setup.backbone.model.config
    tokenizer = copy.deepcopy(backbone.tokenizer)
    if family == "gemma3":
        for name, token in {"image": "<image>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}.items():
            setattr(tokenizer, f"{name}_token", token)
            setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        return Gemma3Processor(backbone.image_processor, tokenizer, image_seq_length=config.mm_tokens_per_image)
    if family == "llava":
        return LlavaProcessor(
            *(backbone.image_processor, tokenizer, config.vision_config.patch_size, config.vision_feature_select_strategy),
            num_additional_image_tokens=1,
        )
    return Idefics3Processor(backbone.image_processor, tokenizer, image_seq_len=4)


@pytest.mark.parametrize(("family", "mark"), [("gemma3", "<|vision_start|>"), ("llava", "<image>"), ("idefics3", "<image>")])
def test_an_image_is_encoded_as_by_the_familys_own_processor(data: Path, folders: Path, family: str, mark: str) -> None:
    setup = make(data, folders, family)
    ids, tensors = setup.processor.family.encode(setup.processor.backbone_processor, Image.open(io.BytesIO(image_of("red")["bytes"])))
    reference = own_processor(setup, family)(
        images=[[setup.processor.catalog.image(ROW["red"])]], text=[f"Item:{mark} a mug"], return_tensors="pt"
    )
    around = [setup.processor.tokens(text) for text in ("Item:", " a mug")]
    assert reference["input_ids"][0].tolist() == [*around[0], *ids, *around[1]]
    assert torch.equal(reference["pixel_values"], setup.processor.family.stack([tensors])["pixel_values"])
    if family == "gemma3":
        batch = setup.processor.collate({"items": [Encoded(reference["input_ids"][0].tolist())]})["items"]
        assert torch.equal(reference["token_type_ids"], batch["token_type_ids"])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_computed_ahead_of_the_model_is_what_it_would_compute(data: Path, folders: Path, family: str) -> None:
    setup = make(data, folders, family)
    batches = setup.processor.collate({"items": [setup.processor.encode(setup.prompts.item(row)) for row in range(len(ITEMS))]})
    left = {name: t for name, t in batches["items"].items() if name != "position_ids"}
    images = {name: batches["images"][name] for name in ("pixel_values", "image_grid_thw")}
    assert len(left) == len(batches["items"]) - 1
    assert len(batches["images"]) >= len(images) + 2
    with torch.no_grad():
        ahead, plain = (setup.mllm.hidden(inputs)["items"] for inputs in (batches, {"items": left, "images": images}))
    assert torch.equal(ahead, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_gpu_attends_to_all_images_at_once_as_to_each_alone(data: Path, folders: Path, family: str) -> None:
    setup = make(data, folders, family, "backbone.dtype=bfloat16")
    device = torch.device("cuda")
    batches = setup.processor.collate({"items": [setup.processor.encode(setup.prompts.item(row)) for row in range(len(ITEMS))]})
    batches = {group: {name: t.to(device) for name, t in batch.items()} for group, batch in batches.items()}
    mllm = setup.mllm.to(device).eval()
    with torch.no_grad():
        alone = mllm(batches, {"items": ("knowledge",)})["items.knowledge"]
        pack_attention(setup.backbone.model, device)
        together = mllm(batches, {"items": ("knowledge",)})["items.knowledge"]
    assert (alone * together).sum(1).min() > 0.999


def test_llava_onevision_sees_an_image_as_one_of_several(data: Path, folders: Path) -> None:
    """Its own processor needs torchvision; its image processor shows two images of one prompt as a tile each."""
    setup = make(data, folders, "llava_onevision")
    red, blue = (setup.processor.catalog.image(ROW[item]) for item in ("red", "blue"))
    reference = setup.backbone.image_processor(images=[[red, blue]], return_tensors="pt")
    images = [setup.processor.images.get(ROW[item]) for item in ("red", "blue")]
    assert torch.equal(reference["pixel_values"], setup.processor.family.stack([p.tensors for p in images])["pixel_values"])
    with torch.no_grad():
        features = setup.backbone.model.model.get_image_features(**reference, return_dict=True).pooler_output
    assert [len(f) for f in features] == [len(p.ids) for p in images]


@pytest.mark.parametrize("family", ["smolvlm", "gemma3", "llava_onevision"])
def test_an_image_budget_that_would_do_nothing_is_refused(data: Path, folders: Path, family: str) -> None:
    with pytest.raises(UserError, match="max_pixels = 128") as error:
        make(data, folders, family, "backbone.max_pixels=128")
    assert error.value.code == USAGE


def test_the_chat_template_of_the_familys_processor_is_the_one_used(data: Path, folders: Path, tmp_path: Path) -> None:
    """Older repositories have it in a separate file."""
    template = "{% for m in messages %}<|end|>user {% for c in m.content %}{{ c.text }}{% endfor %}<|end|>{% endfor %}assistant"
    shutil.copytree(folders / "llava_onevision", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    setup = make(data, tmp_path, "chat")
    assert setup.backbone.tokenizer.decode(setup.processor.head) == "<|end|>user "
    assert setup.backbone.tokenizer.decode(setup.processor.tail) == "<|end|>assistant"
    assert setup.items("red")[0].ids[: len(setup.processor.head)] == setup.processor.head


# --- the configs of published backbones


@pytest.mark.parametrize(
    "path", [p for p in sorted(CONFIGS.glob("*.yaml")) if load_config(p).backbone.name in memory.SHAPES], ids=lambda p: p.stem
)
def test_a_config_states_the_memory_that_is_computed_for_it(path: Path) -> None:
    assert f"# {memory.line(load_config(path))}\n" in path.read_text(encoding="utf-8")


def test_fused_kernels_that_cannot_be_had_are_refused(folders: Path) -> None:
    config = BackboneConfig(name=str(folders / "qwen3_vl"))
    published_backbone(config)  # auto: as they are
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"no fused kernels: no GPU \(backbone.kernels\)") as error:
            published_backbone(config.model_copy(update={"kernels": "liger"}))
        assert error.value.code == ENVIRONMENT
