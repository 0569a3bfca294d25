"""Typed settings: one model per section. `config_file.py` reads them.

The defaults below are `configs/shop.yaml`: the sample shop with the tiny backbone on a CPU.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.core.distill_config import DistillConfig
from pipeline.core.section import Batch, Cosine, Few, Fraction, Positive, Prefix, Rate, Section, Seed, Share, Side, Weight, Width, Workers


class NeighboursConfig(Section):
    """Shows an item that lacks its image or its text with the titles of its nearest neighbours in an earlier run's embeddings."""

    run: str | None = Field(
        default=None, description="run folder whose published embeddings define the neighbours; null: no neighbours are shown"
    )
    count: Few = Field(default=3, description="largest number of neighbour titles shown with an item")
    least: Cosine = Field(default=0.5, description="smallest cosine similarity at which an item counts as a neighbour")


class DataConfig(Section):
    """Catalogue and sessions: the split into training, validation and test, and the item columns that are used."""

    protocol: Literal["time", "user-hash", "cold-items", "last-out"] = Field(
        default="time",
        description="how sessions are split in every step: by start time (time), by a hash of the user_id or session_id (user-hash), the "
        "same with a tenth of the items withheld from training and validation (cold-items), or each session's last item for the test and "
        "the one before it for validation (last-out)",
    )
    valid: Share = Field(
        default=0.1, description="share of the sessions held out for validation; with protocol time those just before the test sessions"
    )
    test: Share = Field(default=0.1, description="share of the sessions held out for the test; with protocol time the latest ones")
    max_prefix: Prefix = Field(default=20, description="longest prefix in events: only the last events of a longer session are used")
    text: list[str] | None = Field(
        default=["title", "description"],
        description="item columns shown to the MLLM as the item's text, in this order; null: title, columns whose values several items "
        "share (categories, brands, people), a year, and description",
    )
    attributes: list[str] | None = Field(
        default=None, description="item columns the MLLM learns to generate; null: every other column of type text or list of texts"
    )
    prompts: str | None = Field(
        default=None, description="YAML file of prompt templates; null: the built-in ones (configs/prompts/default.yaml)"
    )
    on_bad_image: Literal["error", "skip", "text_only"] = Field(
        default="error",
        description="what an image that cannot be decoded does: stop the run (error), count as no image (text_only), "
        "or also keep its item out of the embeddings (skip)",
    )
    neighbours: NeighboursConfig = NeighboursConfig()


class ShopConfig(Section):
    """The generated sample shop, which is used where no data folder is given."""

    items: Annotated[int, Field(ge=20, le=10**7)] = Field(default=1200, description="items in the catalogue")
    sessions: Annotated[int, Field(ge=20, le=10**8)] = Field(default=13500, description="sessions in the log")
    image_size: Side = Field(default=48, description="width and height of an item image in pixels")
    cold_items: Share = Field(
        default=0.15, description="share of cold items, launched after the training sessions, so that no training session holds them"
    )
    launch: Literal["validation", "test"] = Field(
        default="validation", description="first part of the split in whose sessions the cold items are for sale"
    )
    seed: Seed = Field(default=0, description="random seed of the generator")


class TinyConfig(Section):
    """The built-in backbone `tiny`: a small Idefics3 trained from random weights on the catalogue, for CPUs, tests and first tries."""

    vocab: Batch = Field(
        default=768, description="vocabulary size of the byte-level BPE tokenizer that is trained on the catalogue's texts"
    )
    image_size: Side = Field(default=48, description="width and height in pixels to which every image is scaled")
    patch: Side = Field(default=12, description="width and height of a vision patch in pixels")
    merge: Side = Field(default=2, description="pixel shuffle factor: merge x merge patches become one image token")
    vision_dim: Side = Field(default=64, description="hidden size of the vision encoder")
    vision_layers: Few = Field(default=3, description="layers of the vision encoder")
    dim: Side = Field(default=128, description="hidden size of the language model")
    layers: Few = Field(default=4, description="layers of the language model")
    heads: Few = Field(default=4, description="attention heads of the vision encoder and of the language model")

    @model_validator(mode="after")
    def _divides(self) -> "TinyConfig":
        for name, value, divisor, words in (
            ("dim", self.dim, 2 * self.heads, "twice heads"),
            ("vision_dim", self.vision_dim, self.heads, "heads"),
            ("image_size", self.image_size, self.patch * self.merge, "patch times merge"),
        ):
            if value % divisor:
                raise ValueError(f"{name} = {value} is not a multiple of {words}, {divisor}")
        return self


class LoraSettings(Section):
    """LoRA adapters in the language model; the backbone's own weights stay frozen."""

    rank: Width = Field(default=16, description="rank of the adapter matrices")
    alpha: Positive = Field(default=32, description="scale of the adapters: their product is multiplied by alpha / rank")
    dropout: Share = Field(default=0.05, description="dropout on the input of the adapters in training")
    targets: str = Field(
        default=r"model\.(language|text)_model\..*\.(q|k|v|o|gate|up|down)_proj",
        description="regular expression that matches the whole names of the linear layers with adapters, all of the language model",
    )

    @field_validator("targets")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class BackboneConfig(Section):
    """The multimodal LLM, the backbone of every stage."""

    name: str = Field(
        default="tiny",
        description="`tiny`, a Hugging Face image-text-to-text model by name or local folder, or `vectors`, a table of vectors of your own",
    )
    path: str | None = Field(
        default=None, description="table of item vectors, .parquet or .npy, for the backbone `vectors`; null: for any other backbone"
    )
    revision: str | None = Field(default=None, description="commit of the model, where it is named on the hub; null: the latest")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="type of the backbone's weights; bfloat16 only where they are frozen: with LoRA or the variant frozen",
    )
    lora: LoraSettings | None = Field(default=None, description="LoRA adapters; null: every weight is trained, as the tiny backbone needs")
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: frozen weights in 4 bits (QLoRA), with the extra `qlora` and a GPU; so far tried with random weights only",
    )
    pooling: Literal["last", "mean"] = Field(
        default="mean",
        description="the item feature: mean of the last hidden states over the prompt's tokens, in a session those since the item before "
        "(mean), or that of the last token (last), for backbones trained to give their vector there",
    )
    max_text_tokens: Positive = Field(default=96, description="longest item text in tokens; the rest is cut off")
    max_pixels: Positive | None = Field(
        default=None,
        description="largest image in pixels, to which larger ones are scaled down (Qwen families only); null: the processor's default",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(default="sdpa", description="attention implementation of transformers")
    kernels: Literal["auto", "liger", "none"] = Field(
        default="auto",
        description="fused GPU kernels of liger-kernel for a published backbone (extra `gpu`): where there are any (auto), or else an "
        "error (liger), or none; not yet run on a GPU",
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass: less memory, more time")
    tiny: TinyConfig = TinyConfig()

    @model_validator(mode="after")
    def _vectors_have_no_layers(self) -> "BackboneConfig":
        if (self.name == "vectors") != (self.path is not None):
            raise ValueError("name: vectors and path: FILE go together")
        if self.name == "vectors" and (self.lora or self.quantize or self.gradient_checkpointing):
            raise ValueError("vectors have no layers for lora, quantize or gradient_checkpointing")
        return self


class ExportConfig(Section):
    """Export of the item embeddings: `tpad export-embeddings`."""

    dtype: Literal["float32", "float16", "int8"] = Field(
        default="float32", description="type of the vectors; int8 has one scale for each item and each of k(v) and p(v)"
    )
    format: Literal["parquet", "npy"] = Field(
        default="parquet", description="npy: knowledge.npy, transition.npy and item_ids.txt beside the Parquet parts"
    )
    shard_rows: Positive = Field(default=1024, description="items in a part, the unit of resuming and of sharing work between processes")
    token_budget: Positive = Field(default=4096, description="tokens in a batch, padding included; 16384 and more suit a GPU")
    max_pixels: Positive | None = Field(
        default=None, description="largest image in pixels, to which larger ones are scaled down; null: as in training"
    )
    layers: Positive | None = Field(
        default=None,
        description="number of decoder layers that are run, counted from the first; null: all; benchmarks/layers.py measures the loss",
    )
    workers: Workers = Field(default=1, description="processes that decode images and tokenise ahead; 0: a thread")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None, description="attention implementation of transformers; null: as in training"
    )
    compile: bool = Field(default=False, description="torch.compile, with sequences padded to a few lengths")
    keep: Positive = Field(default=2, description="published versions of the embeddings that are kept")


class PartsConfig(Section):
    """Components of the session model. Each can be left out to measure its contribution."""

    graph: bool = Field(default=True, description="gated graph step over the transitions inside the session")
    attention: bool = Field(default=True, description="attention of each position over its whole prefix")
    followers: bool = Field(default=True, description="next-item counts: how often an item directly followed another in training")
    companions: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=3, description="co-occurrence counts of items at most so many positions apart, before or after; 0: none"
    )
    repeat: bool = Field(
        default=True, description="repeats: items of the prefix get a weight by how long ago they were seen, and a repeat discount"
    )
    popularity: bool = Field(default=True, description="popularity prior: training count of an item, and its count predicted from content")
    directions: bool = Field(
        default=True, description="id vectors start from the main directions of the items' co-occurrence (PPMI), not at random"
    )
    whitening: bool = Field(
        default=True, description="PCA whitening of the exported vectors, fitted on training items; false: only centred and scaled"
    )


class SbrConfig(Section):
    """The session model. Every baseline is trained beside it, on the same data with the same settings."""

    dim: Width = Field(default=64, description="dimension of the item and session vectors")
    components: Width | None = Field(
        default=64,
        description="principal components kept of each of k(v) and p(v), at most: the smaller ones are mostly noise; null: all",
    )
    epochs: Positive = Field(default=6, description="largest number of epochs, over which the learning rate falls to zero")
    batch: Batch = Field(
        default=128, description="sessions in a step, over all processes together; one longer than data.max_prefix counts as several"
    )
    lr: Rate = Field(default=3e-3, description="initial learning rate of AdamW")
    weight_decay: Weight = Field(default=1e-4, description="weight decay of AdamW")
    content_decay: Weight = Field(
        default=0.5,
        description="weight decay of the content projection (embedding dim x dim); regularises against overfitting on few sessions",
    )
    id_dropout: Share = Field(
        default=0.2,
        description="share of the items whose id is hidden in a training step, so that the model learns to rank cold items by content",
    )
    dropout: Share = Field(default=0.2, description="dropout in the models of the literature (GRU4Rec, SASRec, ...)")
    select: Literal["HR@10", "HR@20", "MRR@10", "MRR@20", "NDCG@10", "NDCG@20"] = Field(
        default="MRR@20", description="metric on validation by which the best epoch is selected"
    )
    patience: Positive = Field(default=3, description="epochs without improvement after which training stops")
    loss: Literal["auto", "softmax", "sampled", "gbce"] = Field(
        default="auto",
        description="softmax over all items (softmax), sampled softmax with logQ correction (sampled), or sampled above 5,000 items, else "
        "softmax (auto); gbce: SASRec takes binary cross-entropy over a sample (gSASRec, arXiv 2308.07192), the other models auto",
    )
    negatives: Batch = Field(default=2048, description="items sampled for a step with the losses sampled and gbce")
    calibration: Fraction = Field(
        default=0.75,
        description="t of gbce: 0 is plain binary cross-entropy; with 1 probabilities are calibrated as if all items had been negatives",
    )
    own_loss: Weight = Field(default=0.0, description="weight of an auxiliary loss that trains each channel (ids, content) on its own")
    parts: PartsConfig = PartsConfig()
    precision: Literal["no", "bf16"] = Field(
        default="no", description="bf16: matrix products of the training in bfloat16, for GPUs that support it"
    )
    refit: bool = Field(
        default=True,
        description="publish a model trained again on all sessions, validation and test too; figures are those of its held-out twin",
    )
    new_items: float = Field(
        default=0.0,
        ge=-20,
        le=20,
        description="log-odds added to cold items when recommending; `--new-items` and a request's new_items replace it",
    )
    seeds: Few = Field(
        default=1, description="runs of each trained model; the table shows mean and standard deviation, the first run is published"
    )
    index: str = Field(
        default="auto",
        max_length=100,  # FAISS reads it by recursion
        description="item index: flat (exact), hnsw, ivf, ivfpq, a FAISS factory string, or auto, by catalogue size; `tpad index` "
        "changes it",
    )
    models: list[str] = Field(
        default=["ID-only", "content-only", "full"],
        description="models to train, of those in recommender/baselines (e.g. SASRec, SASRec on vectors); full is published, else ID-only",
    )

    @field_validator("models")
    @classmethod
    def with_one_to_publish(cls, value: list[str]) -> list[str]:
        if not {"full", "ID-only"} & set(value):
            raise ValueError("must contain full or ID-only, which is what is published")
        return value


class Config(Section):
    """All settings of a run. The defaults are those of `configs/shop.yaml`: the sample shop with the tiny backbone on a CPU."""

    seed: Seed = Field(default=0, description="random seed of every training")
    data: DataConfig = DataConfig()
    shop: ShopConfig = ShopConfig()
    backbone: BackboneConfig = BackboneConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    sbr: SbrConfig = SbrConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        if self.backbone.dtype != "float32" and self.backbone.lora is None and self.distill.variant != "frozen":
            message = "`backbone.dtype` = '{dtype}' with `backbone.lora` = None: every weight trains, and small steps are lost in it"
            raise PydanticCustomError("sections", message, {"dtype": self.backbone.dtype})
        if self.distill.refit and not self.sbr.refit:
            message = "`distill.refit` = True with `sbr.refit` = False: no model would read its embeddings"
            raise PydanticCustomError("sections", message)
        return self
