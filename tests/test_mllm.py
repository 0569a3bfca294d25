"""Features of items: what they depend on (picture, text) and what they do not (neighbours in the batch, saving)."""

import copy
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_run import FAMILIES, PHASES, TINY, distill_run, export_run, losses, same, save_backbone, two_processes, weights
from torch import nn
from transformers import Gemma3Processor, Idefics3Processor, LlavaProcessor
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks import memory
from pipeline.artifact import read_embeddings
from pipeline.backbone import UNQUANTIZED, Backbone, build_backbone
from pipeline.catalog import load_catalog
from pipeline.config import Config, load_config
from pipeline.errors import ARTIFACT, ENVIRONMENT, USAGE, UserError
from pipeline.mllm import MODEL_INPUTS, Encoded, Encoder, Mllm, embed, load_mllm, load_trainable, save_mllm, trainable_state
from pipeline.prompts import NO_IMAGE, NO_TEXT, Part, Prompts, View

CONFIGS = Path(__file__).parent.parent / "configs"
LONG = "a very large mug of clay with a handle, a lid, a saucer and a spoon"
ITEMS: dict[str, tuple[str, str, str | None]] = {  # item_id -> title, material, colour of the picture
    "red": ("a mug", "clay", "red"),
    "blue": ("a mug", "clay", "blue"),
    "no-picture": ("a mug", "clay", None),
    "no-text": ("", "", "red"),
    "long": (LONG, "glass", "green"),
    "red-again": ("a mug", "clay", "red"),
}
ROW = {item_id: row for row, item_id in enumerate(ITEMS)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def picture(colour: str | None) -> dict[str, bytes | None] | None:
    if colour is None:
        return None
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    images = pa.array([picture(colour) for _, _, colour in ITEMS.values()], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {"item_id": list(ITEMS), "title": [t for t, _, _ in ITEMS.values()], "material": [m for _, m, _ in ITEMS.values()]}
    pq.write_table(pa.table({**columns, "image": images}), folder / "items.parquet")
    return folder


@dataclass(frozen=True)
class Made:
    config: Config
    prompts: Prompts
    backbone: Backbone
    encoder: Encoder
    mllm: Mllm

    def features(self, sequences: Sequence[Encoded], token_budget: int, head: str = "knowledge") -> np.ndarray:
        return embed(self.mllm.eval(), self.encoder, sequences, (head,), token_budget, "cpu")[head]

    def items(self, *item_ids: str) -> list[Encoded]:
        return [self.encoder.encode(self.prompts.item(ROW[item_id])) for item_id in item_ids]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backbones")
    for family in FAMILIES:
        save_backbone(root / family, family)
    return root


def make(data: Path, folders: Path, family: str, *more: str) -> Made:
    name = [] if family == "tiny" else [f"backbone.name={folders / family}", "backbone.lora.rank=2", "backbone.lora.dropout=0.0"]
    config = load_config(None, [*TINY, *name, *more])
    catalog = load_catalog(data)
    prompts = Prompts(catalog, config.data)
    backbone = build_backbone(config.backbone, prompts, config.seed)
    torch.manual_seed(1)
    mllm = Mllm(backbone.model, ("knowledge", "transition"), 8)
    return Made(config, prompts, backbone, Encoder(config.backbone, backbone, catalog), mllm)


@pytest.fixture(scope="module", params=["tiny", *FAMILIES])
def made(request: pytest.FixtureRequest, data: Path, folders: Path) -> Made:
    return make(data, folders, request.param)


@pytest.fixture(scope="module")
def tiny(data: Path, folders: Path) -> Made:
    return make(data, folders, "tiny")


# --- what a feature depends on


def test_an_item_has_the_same_features_alone_and_in_any_batch(made: Made) -> None:
    sequences = made.items(*ITEMS)
    assert len({len(s) for s in sequences}) > 2
    assert len({len(s.pictures) for s in sequences}) == 2
    alone, together = made.features(sequences, 1), made.features(sequences, 10_000)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(made.features(sequences[::-1], 10_000)[::-1], alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


def test_no_feature_depends_on_the_attention_mask(made: Made) -> None:
    """Padding is on the right and attention causal, which is why the export leaves the mask out."""
    batches = made.encoder.collate({"items": made.items(*ITEMS)})
    with torch.no_grad():
        masked = made.mllm.eval()(batches, {"items": ("knowledge",)})["items.knowledge"]
        del batches["items"]["attention_mask"]
        torch.testing.assert_close(made.mllm(batches, {"items": ("knowledge",)})["items.knowledge"], masked, atol=1e-5, rtol=0)


def test_the_length_of_a_sequence_is_known_before_its_picture_is_decoded(made: Made) -> None:
    assert [made.encoder.length(made.prompts.item(row)) for row in ROW.values()] == [len(s) for s in made.items(*ITEMS)]


def test_picture_and_text_both_matter(made: Made) -> None:
    red, blue, none, untitled, long, again = made.features(made.items(*ITEMS), 10_000)
    np.testing.assert_allclose(red, again, atol=1e-5)
    for other in (blue, none, untitled, long):
        assert np.abs(red - other).max() > 1e-3


def test_equal_pictures_go_through_the_vision_tower_once(made: Made) -> None:
    batches = made.encoder.collate({"items": made.items("red", "blue", "no-picture"), "more": made.items("red-again", "red", "long")})
    one, two, three = (made.encoder.picture(ROW[item]) for item in ("red", "blue", "long"))
    for name, tensor in made.encoder.family.stack([p.tensors for p in (one, two, three)]).items():
        assert torch.equal(batches["pictures"][name], tensor)
    assert batches["items"]["picture_at"].tolist() == [0, 1]
    assert batches["more"]["picture_at"].tolist() == [0, 0, 2]


def test_the_answer_does_not_show_in_the_feature(made: Made) -> None:
    """The feature is read before the answer, and a token sees only what stands before it."""
    item = made.prompts.item(ROW["red"])
    answered = [made.encoder.encode([*item, Part("text", "title:"), Part("answer", answer)]) for answer in ("a mug", LONG)]
    features = made.features([made.encoder.encode(item), *answered], 10_000)
    np.testing.assert_allclose(features[1:], features[[0, 0]], atol=1e-5)


def test_generation_loss_is_that_of_the_language_model(made: Made) -> None:
    answers = ("a mug", LONG)
    rows = (ROW["red"], ROW["blue"])
    sequences = [made.encoder.encode([*made.prompts.item(row), Part("answer", a)]) for row, a in zip(rows, answers, strict=True)]
    for s, answer in zip(sequences, answers, strict=True):
        written = [s.ids[at] for at in s.answers]
        assert made.backbone.tokenizer.decode(written[:-1]).strip() == answer
        assert written[-1] == made.backbone.tokenizer.eos_token_id
    batches = made.encoder.collate({"items": sequences})
    batch, pixels = batches["items"], batches["pictures"]
    with torch.no_grad():
        nll = float(made.mllm(batches, {"items": ()})["items.nll"])
        labels = torch.full_like(batch["input_ids"], -100)
        for b, s in enumerate(sequences):
            labels[b, s.answers] = batch["input_ids"][b, s.answers]
        text = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        mean = float(made.backbone.model(**text, **pixels, labels=labels).loss)
    assert nll == pytest.approx(mean * sum(len(s.answers) for s in sequences), rel=1e-4)


def test_a_session_reads_one_feature_for_every_item_it_asks_for(made: Made) -> None:
    """Each prefix of the session stands in the same sequence, and sees nothing of what comes after it."""
    rows = [ROW[item] for item in ("red", "no-picture", "long", "blue")]
    whole = made.encoder.encode(made.prompts.session(rows))
    assert len(whole.reads) == len(rows) - 1
    other = made.encoder.encode(made.prompts.session([*rows[:2], ROW["no-text"], ROW["red"]]))
    with torch.no_grad():
        one, two = (made.mllm(made.encoder.collate({"s": [s]}), {"s": ("knowledge",)})["s.knowledge"] for s in (whole, other))
    np.testing.assert_allclose(one[:2], two[:2], atol=1e-5)
    assert (one[2] - two[2]).abs().max() > 1e-3


def test_long_texts_are_cut(data: Path, folders: Path, tiny: Made) -> None:
    cut = make(data, folders, "tiny", "backbone.max_text_tokens=4")
    assert len(cut.items("long")[0]) < len(tiny.items("long")[0])
    assert len(cut.items("long")[0]) == len(cut.items("red")[0]) + 4 - len(tiny.encoder.tokens(" a mug"))


def test_a_pixel_budget_makes_fewer_tokens(data: Path, folders: Path) -> None:
    whole, small = make(data, folders, "qwen3_vl"), make(data, folders, "qwen3_vl", "backbone.max_pixels=128")
    assert len(small.items("red")[0]) < len(whole.items("red")[0])
    assert np.isfinite(small.features(small.items(*ITEMS), 10_000)).all()


def test_the_chat_template_of_the_familys_processor_is_the_one_used(data: Path, folders: Path, tmp_path: Path) -> None:
    """Older repositories keep it in a file beside the tokenizer's."""
    template = "{% for m in messages %}<|end|>user {% for c in m.content %}{{ c.text }}{% endfor %}<|end|>{% endfor %}assistant"
    shutil.copytree(folders / "llava_onevision", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    made = make(data, tmp_path, "chat")
    assert made.backbone.tokenizer.decode(made.encoder.head) == "<|end|>user "
    assert made.backbone.tokenizer.decode(made.encoder.tail) == "<|end|>assistant"
    assert made.items("red")[0].ids[: len(made.encoder.head)] == made.encoder.head


# --- prompts


def texts(parts: list[Part]) -> list[str]:
    return [part.text for part in parts if part.kind == "text"]


def test_a_withheld_modality_is_said_in_words(tiny: Made) -> None:
    prompts, red = tiny.prompts, ROW["red"]
    full = prompts.item(red)
    assert [part.row for part in full if part.kind == "image"] == [red]
    assert not {NO_IMAGE, NO_TEXT} & set(texts(full))
    no_image, no_text = prompts.item(red, View(False, True)), prompts.item(red, View(True, False))
    assert not [part for part in no_image if part.kind == "image"]
    assert NO_IMAGE in texts(no_image)
    assert "a mug" in texts(no_image)
    assert NO_TEXT in texts(no_text)
    assert "a mug" not in " ".join(texts(no_text))
    # an item that lacks one looks like an item of which it is withheld
    assert prompts.item(ROW["no-picture"]) == no_image
    assert [part._replace(row=red) if part.kind == "image" else part for part in prompts.item(ROW["no-text"])] == no_text


def test_the_prompt_never_shows_what_is_to_be_written(tiny: Made) -> None:
    asked = set()
    for seed in range(40):
        for view in (View(True, True), View(True, False), View(False, True)):
            parts = tiny.prompts.knowledge(ROW["long"], view, np.random.default_rng(seed))
            answer = parts[-1]
            assert answer.kind == "answer"
            assert answer.text in (LONG, "glass")
            assert answer.text not in texts(parts)
            asked.add((view, answer.text))
    assert (View(True, False), LONG) in asked
    assert (View(True, True), "glass") in asked
    assert (View(True, True), LONG) not in asked


def test_views_to_be_pulled_together_are_only_those_the_item_has(tiny: Made) -> None:
    pairs = [[tiny.prompts.pair(ROW[item], np.random.default_rng(seed)) for seed in range(30)] for item in ("red", "no-picture", "no-text")]
    assert all(one != other for one, other in pairs[0])
    assert {one for pair in pairs[0] for one in pair} == {View(True, True), View(True, False), View(False, True)}
    assert all(one == other for item in pairs[1:] for one, other in item)


# --- saving, loading, training


def test_a_saved_model_comes_back_exactly(made: Made, tmp_path: Path) -> None:
    with torch.no_grad():
        for weight in trainable_state(made.mllm).values():
            weight.add_(0.01)
    facts = {"backbone": made.config.backbone.model_dump(), "heads": list(made.mllm.heads), "dim": 8}
    save_mllm(tmp_path, made.mllm, made.backbone, facts)
    again, backbone, settings = load_mllm(tmp_path)
    assert settings == facts
    assert same(made.mllm.state_dict(), again.state_dict())
    encoder = Encoder(made.config.backbone, backbone, made.encoder.catalog)
    sequences = [encoder.encode(made.prompts.item(row)) for row in ROW.values()]
    assert [s.ids for s in sequences] == [s.ids for s in made.items(*ITEMS)]
    before = made.features(made.items(*ITEMS), 10_000)
    np.testing.assert_array_equal(embed(again.eval(), encoder, sequences, ("knowledge",), 10_000, "cpu")["knowledge"], before)
    merged, _, _ = load_mllm(tmp_path, merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    np.testing.assert_allclose(embed(merged.eval(), encoder, sequences, ("knowledge",), 10_000, "cpu")["knowledge"], before, atol=1e-5)


def test_weights_of_another_model_are_refused(tiny: Made, tmp_path: Path) -> None:
    state = {name: weight.detach().clone() for name, weight in trainable_state(tiny.mllm).items()}
    for wrong in ({**state, "more": torch.zeros(1)}, dict(list(state.items())[1:]), {n: w.flatten()[:1] for n, w in state.items()}):
        with pytest.raises(UserError, match="do not fit") as error:
            load_trainable(tiny.mllm, wrong, "here")
        assert error.value.code == ARTIFACT


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_of_the_language_model_and_heads_train(data: Path, folders: Path, family: str) -> None:
    made = make(data, folders, family)
    decoder = made.backbone.model.get_decoder()
    adapted = {name for name, module in decoder.named_modules() if hasattr(module, "lora_A")}
    linear = {name.removesuffix(".base_layer") for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    assert adapted == {name for name in linear if "lora_" not in name}
    names = set(trainable_state(made.mllm))
    inside = {name for name, p in made.mllm.named_parameters() if any(p is q for q in decoder.parameters())}
    assert {name for name in names if not name.startswith("heads.")} == {name for name in inside if "lora_" in name}

    before = {name: tensor.clone() for name, tensor in made.mllm.state_dict().items()}
    optimizer = torch.optim.AdamW(made.mllm.parameters(), 1e-2)
    made.mllm.train()
    for _ in range(2):  # A moves once B is no longer zero
        sequences = [made.encoder.encode([*made.prompts.item(row), Part("answer", "clay")]) for row in ROW.values()]
        out = made.mllm(made.encoder.collate({"items": sequences}), {"items": ("knowledge", "transition")})
        optimizer.zero_grad()
        (out["items.nll"] + out["items.knowledge"].sum() + out["items.transition"].sum()).backward()
        optimizer.step()
    changed = {name for name, tensor in made.mllm.state_dict().items() if not torch.equal(tensor, before[name])}
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
    made = make(data, folders, "gemma3", r"backbone.lora.targets='model\.language_model\.layers\.1\..*\.[qv]_proj'")
    adapted = {name.split(".lora_")[0] for name in trainable_state(made.backbone.model)}
    assert adapted == {f"model.language_model.layers.1.self_attn.{of}_proj" for of in "qv"}


def test_four_bits_are_for_the_language_model_alone(made: Made) -> None:
    decoder = {id(module) for module in made.backbone.model.get_decoder().modules()}
    linear = [(name, module) for name, module in made.backbone.model.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name, _ in linear if should_convert_module(name, UNQUANTIZED)} == {name for name, m in linear if id(m) in decoder}


def test_four_bits_without_a_gpu_is_one_clear_line(data: Path, folders: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"backbone\.quantize") as error:
        make(data, folders, "smolvlm", "backbone.quantize=nf4")
    assert error.value.code == ENVIRONMENT


def test_in_bf16_adapters_and_heads_stay_fp32_and_features_stay_near(data: Path, folders: Path, tiny_data: Path, tmp_path: Path) -> None:
    whole, half = make(data, folders, "gemma3"), make(data, folders, "gemma3", "backbone.dtype=bfloat16")
    assert {p.dtype for p in half.backbone.model.get_decoder().parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in trainable_state(half.mllm).values()} == {torch.float32}
    cosine = (whole.features(whole.items(*ITEMS), 10_000) * half.features(half.items(*ITEMS), 10_000)).sum(1)
    assert cosine.min() > 0.999
    more = [*FEW, f"backbone.name={folders / 'gemma3'}", "backbone.dtype=bfloat16"]
    assert distill_run(tmp_path, tiny_data, *more)
    export_run(tmp_path, tiny_data, *more)
    found = read_embeddings(tmp_path / "embeddings")
    np.testing.assert_allclose(np.linalg.norm(found.transition, axis=1), 1, atol=1e-5)


FEW = [f"distill.{phase}.{setting}" for phase in PHASES for setting in ("steps=2", "batch=4")]
FEW += ["backbone.gradient_checkpointing=true", "backbone.lora.rank=2", "backbone.lora.dropout=0.0"]


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
    found = read_embeddings(run / "embeddings")
    assert found.knowledge.shape == found.transition.shape == (40, 16)
    assert len(np.unique(found.knowledge.round(5), axis=0)) > 30
    assert str(run.parent.parent) not in (found.version.path / "manifest.json").read_text()
    assert found.version.manifest["backbone"] == family


ALIKE = {"idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "llava"}  # like another one, as far as processes are concerned


@pytest.mark.parametrize("family", [pytest.param(family, marks=[pytest.mark.slow] * (family in ALIKE)) for family in FAMILIES])
def test_two_processes_distil_a_local_backbone_as_one(family: str, folders: Path, distilled: Path, tiny_data: Path, tmp_path: Path) -> None:
    two_processes(distill_run, tmp_path, tiny_data, *FEW, f"backbone.name={folders / family}")
    one, two = losses(distilled / family), losses(tmp_path)
    assert all(abs(two[step]["loss"] - of["loss"]) < 1e-3 for step, of in one.items())
    for name, weight in weights(distilled / family).items():
        torch.testing.assert_close(weights(tmp_path)[name], weight, atol=2e-3, rtol=0)


def test_a_backbone_that_is_gone_is_one_clear_line(tiny_data: Path, tmp_path: Path) -> None:
    text = (tmp_path / "nothing").as_posix()
    with pytest.raises(UserError, match=r"backbone\.name") as error:
        build_backbone(load_config(None, [f"backbone.name={text}"]).backbone, Prompts(load_catalog(tiny_data), load_config().data), 0)
    assert error.value.code == ENVIRONMENT


def test_an_unknown_family_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    folder = save_backbone(tmp_path / "paligemma", "smolvlm")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**small, image_size=16, patch_size=8), text_config=GemmaConfig(**small, vocab_size=300, head_dim=8)
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    with pytest.raises(UserError, match="`paligemma` is not supported") as error:
        make(data, tmp_path, "paligemma")
    assert error.value.code == USAGE


# --- as the family's own processor has it


def own_processor(made: Made, family: str) -> Any:
    """Of the families that have one without torchvision."""
    backbone, config = made.backbone, made.backbone.model.config
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
def test_a_picture_is_encoded_as_by_the_familys_own_processor(data: Path, folders: Path, family: str, mark: str) -> None:
    made = make(data, folders, family)
    ids, tensors = made.encoder.family.encode(made.encoder.processor, Image.open(io.BytesIO(picture("red")["bytes"])))
    own = own_processor(made, family)(images=[[made.encoder.catalog.image(ROW["red"])]], text=[f"Item:{mark} a mug"], return_tensors="pt")
    around = [made.encoder.tokens(text) for text in ("Item:", " a mug")]
    assert own["input_ids"][0].tolist() == [*around[0], *ids, *around[1]]
    assert torch.equal(own["pixel_values"], made.encoder.family.stack([tensors])["pixel_values"])
    if family == "gemma3":
        batch = made.encoder.collate({"items": [Encoded(own["input_ids"][0].tolist())]})["items"]
        assert torch.equal(own["token_type_ids"], batch["token_type_ids"])


def test_llava_onevision_sees_a_picture_as_one_of_several(data: Path, folders: Path) -> None:
    """Its own processor needs torchvision; its image processor shows two pictures of one prompt as a tile each."""
    made = make(data, folders, "llava_onevision")
    red, blue = (made.encoder.catalog.image(ROW[item]) for item in ("red", "blue"))
    own = made.backbone.image_processor(images=[[red, blue]], return_tensors="pt")
    pictures = [made.encoder.picture(ROW[item]) for item in ("red", "blue")]
    assert torch.equal(own["pixel_values"], made.encoder.family.stack([p.tensors for p in pictures])["pixel_values"])
    with torch.no_grad():
        features = made.backbone.model.model.get_image_features(**own, return_dict=True).pooler_output
    assert [len(f) for f in features] == [len(p.ids) for p in pictures]


@pytest.mark.parametrize("family", ["smolvlm", "gemma3", "llava_onevision"])
def test_an_image_budget_that_would_do_nothing_is_refused(data: Path, folders: Path, family: str) -> None:
    with pytest.raises(UserError, match="max_pixels = 128") as error:
        make(data, folders, family, "backbone.max_pixels=128")
    assert error.value.code == USAGE


# --- the configs of published backbones


@pytest.mark.parametrize(
    "path", [p for p in sorted(CONFIGS.glob("*.yaml")) if load_config(p).backbone.name in memory.SHAPES], ids=lambda p: p.stem
)
def test_a_config_states_the_memory_that_is_computed_for_it(path: Path) -> None:
    assert f"# {memory.line(load_config(path))}\n" in path.read_text(encoding="utf-8")
