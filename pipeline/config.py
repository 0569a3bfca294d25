"""Typed settings out of YAML (`strict_yaml.py`): one file, one model per section.

An unknown key, a wrong type or an out-of-range value is an error that names the file, the line and the nearest
known key. All errors of a file are reported together. The defaults below are `configs/shop.yaml`: the sample shop
with the tiny backbone on a CPU.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.errors import USAGE, UserError
from pipeline.strict_yaml import parse, read, written

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # what numpy and torch both take, with room to count up from
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class NeighboursConfig(Section):
    """An item that lacks its image or its text is shown with the titles of near ones, see pipeline/neighbours.py."""

    run: str | None = None  # run folder whose published embeddings say what is near; null: none are shown
    count: Positive = 3  # titles, at most
    least: Cosine = 0.5  # no title of an item less near, by cosine


class DataConfig(Section):
    # how sessions are split, for every step: see pipeline/split.py
    protocol: Literal["time", "user-hash", "last-out"] = "time"
    valid: Share = 0.1  # share of the sessions held out for validation; by time: those before the test ones
    test: Share = 0.1  # share of the sessions held out for the test; by time: the last ones
    max_prefix: Positive = 20  # a session is cut to its last so many events before it is used as a prefix
    text: list[str] = ["title", "description"]  # item columns shown to the MLLM, in this order
    attributes: list[str] | None = None  # item columns it learns to write; null: every other one of texts, or of lists of texts
    prompts: str | None = None  # file of prompt templates, as configs/prompts/default.yaml; null: those
    # an image that cannot be decoded stops the run, counts as none, or keeps its item out of the embeddings (and counts as none before)
    on_bad_image: Literal["error", "skip", "text_only"] = "error"
    neighbours: NeighboursConfig = NeighboursConfig()


class ShopConfig(Section):
    items: Annotated[Positive, Field(ge=20)] = 1200
    sessions: Annotated[Positive, Field(ge=20)] = 13500
    image_size: Positive = 48  # pixels a side
    cold_items: Share = 0.15  # share of the items launched after the training sessions, which no training session holds
    launch: Literal["validation", "test"] = "validation"  # the first sessions in which they are for sale
    seed: Seed = 0


class TinyConfig(Section):
    """The built-in Idefics3, trained from nothing on the catalogue: for CPUs, tests and first looks."""

    vocab: Positive = 768  # entries of the byte-level BPE trained on the catalogue's texts
    image_size: Positive = 48  # pixels a side
    patch: Positive = 12  # pixels a side of a vision patch
    merge: Positive = 2  # pixel shuffle: merge x merge patches become one image token
    vision_dim: Positive = 64
    vision_layers: Positive = 3
    dim: Positive = 128
    layers: Positive = 4
    heads: Positive = 4

    @model_validator(mode="after")
    def _divides(self) -> "TinyConfig":
        for name, whole, part, by in (
            ("dim", self.dim, 2 * self.heads, "twice heads"),
            ("vision_dim", self.vision_dim, self.heads, "heads"),
            ("image_size", self.image_size, self.patch * self.merge, "patch times merge"),
        ):
            if whole % part:
                raise ValueError(f"{name} = {whole} does not divide by {by}, {part}")
        return self


class LoraSettings(Section):
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.05
    # names of the linear layers with adapters, a regular expression over the whole name; all must be of the language model
    targets: str = r"model\.(language|text)_model\..*\.(q|k|v|o|gate|up|down)_proj"

    @field_validator("targets")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class BackboneConfig(Section):
    name: str = "tiny"  # "tiny", or a Hugging Face image-text-to-text model by name or local folder
    revision: str | None = None  # commit of the model, for a name on the hub
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 where they are frozen: with `lora`
    lora: LoraSettings | None = None  # null trains every weight, as the tiny model needs
    # nf4: frozen weights in 4 bits (QLoRA), with the extra `qlora` and a GPU; tried with random weights alone
    quantize: Literal["nf4"] | None = None
    # an item's feature: the last hidden state of its prompt's last token; or the mean over its tokens (in a session, over those since the
    # item before), which may be the better start where the language model was never asked for one vector
    pooling: Literal["last", "mean"] = "last"
    max_text_tokens: Positive = 96  # the text of one item is cut to so many tokens
    max_pixels: Positive | None = None  # pictures are scaled down to so many pixels, in the Qwen families; null: the processor's default
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    tiny: TinyConfig = TinyConfig()


class PhaseConfig(Section):
    steps: Count
    batch: Positive  # items (knowledge, align) or sessions (transfer) a step, over all processes together
    lr: Rate = 1e-3
    warmup: Share = 0.05  # share of the steps over which the learning rate rises; cosine decay follows
    weight_decay: Weight = 0.01
    clip: Rate = 1.0  # gradient norm


class KnowledgeConfig(PhaseConfig):
    """Stage 1, Knowledge Acquisition."""

    steps: Count = 150
    batch: Positive = 64
    generation: Weight = 1.0  # weight of L_gen
    view: Weight = 0.5  # weight of L_view
    temperature: Rate = 0.1  # of L_view


class TransferConfig(PhaseConfig):
    """Stage 2, first half: the Transfer-MLLM on session instructions."""

    steps: Count = 450
    batch: Positive = 32
    lr: Rate = 1.5e-3
    start: Literal["knowledge", "base"] = "knowledge"  # whose weights T starts from: K's, or the untouched backbone's
    items: Positive = 4  # a window of so many items, drawn anywhere in the session, is shown, and the next item asked for after each
    retrieval: Weight = 1.0  # weight of the next-item InfoNCE, whose temperature is learned
    generation: Weight = 0.2  # weight of writing the next item's text (data.text)
    disentangle: Weight = 0.05  # weight of vCLUB-S between t(v) and c(v), a dimension
    withhold_text: Share = 0.15  # share of the items shown by their picture alone: what words do not say is learned sooner
    withhold_image: Share = 0.05  # share of the items shown by their text alone
    tie: Weight = 0.2  # weight of InfoNCE between c(v) and k(v)
    temperature: Rate = 0.1  # of that InfoNCE
    summary: Count = 0  # blocks of `items` items before those shown, at most, that K folds into a text shown too; 0: none
    summary_tokens: Positive = 24  # length of that text, at most
    intent: Weight = 0.0  # weight of writing what most items of the session have in common, by their attributes
    teacher: str | None = None  # run folder whose session model gives soft next-item targets; null: none
    soft: Weight = 0.5  # weight of following that teacher


class AlignConfig(PhaseConfig):
    """Stage 2, second half: transitional pattern alignment, which turns K into the unified MLLM."""

    steps: Count = 200
    batch: Positive = 128
    lr: Rate = 2e-3
    align: Weight = 1.0  # weight of the lower bound of I(p; t)
    bound: Literal["info_nce", "smile"] = "info_nce"  # of cosines over a temperature, or SMILE with a learned critic
    temperature: Rate = 0.07
    relation: Weight = 1.0  # weight of the item-item relation loss
    generation: Weight = 0.2  # weight of L_gen
    token_distill: Weight = 0.0  # weight of KL from T's distribution of each token written to the unified MLLM's; 0: none, and no T held
    withhold_text: Share = 0.15  # as in transfer
    withhold_image: Share = 0.15
    keep: Weight = 1.0  # weight of staying where stage 1 put k(v)
    disentangle: Weight = 0.2  # weight of vCLUB-S between p(v) and k(v), a dimension


class CriticConfig(Section):
    """The networks of the CLUB bounds and of SMILE: trained on detached features, with an optimiser of their own."""

    hidden: Positive = 128
    lr: Rate = 2e-3
    inner_steps: Positive = 2  # critic steps a training step
    warmup: Count = 30  # training steps before the bound enters the loss


class ProbeConfig(Section):
    """The bounds measured on items outside the step's batch, logged as held_out_...: what the critics know by heart does not count."""

    every: Count = 50  # steps; 0: never
    items: Positive = 256  # at most


VariantName = Literal[
    "full",
    "no_generation",
    "no_disentangle",
    "no_view",
    "no_relation",
    "knowledge",
    "transfer",
    "side_by_side",
    "merge",
    "frozen",
]


class MergeConfig(Section):
    """How the variant `merge` composes the weights of K and T."""

    method: Literal["cat", "svd"] = "cat"  # of adapters: their concatenation, exact; or svd, of the same rank as either
    knowledge: Weight = 0.5  # share of what K has learned
    transfer: Weight = 0.5  # share of what T has learned

    @field_validator("method", mode="before")
    @classmethod
    def whole_products(cls, value: Any) -> Any:
        if value in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
            raise ValueError("would combine the factors A and B of the adapters separately, not their products; take cat or svd")
        return value


class DistillConfig(Section):
    dim: Positive = 64  # D: length of k(v), and of p(v)
    variant: VariantName = "full"  # an ablation: what of the method is left out, see pipeline/variants.py
    merge: MergeConfig = MergeConfig()
    checkpoint_every: Positive = 100  # steps
    workers: Count = 0  # processes that decode and tokenise ahead; 0: in line
    # disk for what a vision tower that does not train makes of the pictures, computed once for all phases and the export; 0: none
    vision_cache_gb: Weight = 0.0
    # sequences a forward pass, in each process; null: all. Less memory for the same gradient, and a second pass forward (GradCache)
    chunk: Positive | None = None
    log_with: list[str] = []  # accelerate trackers beside metrics.jsonl, e.g. [tensorboard]
    knowledge: KnowledgeConfig = KnowledgeConfig()
    transfer: TransferConfig = TransferConfig()
    align: AlignConfig = AlignConfig()
    critic: CriticConfig = CriticConfig()
    probe: ProbeConfig = ProbeConfig()


class ExportConfig(Section):
    dtype: Literal["float32", "float16", "int8"] = "float32"  # of the vectors; int8 with a scale for each row and half
    format: Literal["parquet", "npy"] = "parquet"  # npy: knowledge.npy, transition.npy and item_ids.txt beside the Parquet parts
    shard_rows: Positive = 1024  # items a part: the unit of resume, and of work for a process
    token_budget: Positive = 4096  # tokens a batch, padding included; for a GPU rather 16384 and more
    max_pixels: Positive | None = None  # images are scaled down to so many pixels; null: as in training
    layers: Positive | None = None  # only the first so many layers of the decoder are run; null: all. `tpad distill` says what it costs
    workers: Count = 1  # processes that decode and tokenise ahead; 0: a thread
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None  # null: as in training
    compile: bool = False  # torch.compile; sequences are padded to a few lengths for it
    keep: Positive = 2  # published versions kept


class PartsConfig(Section):
    """What our session model is made of. Each part can be left out, to see what it adds."""

    graph: bool = True  # gated step over the transitions inside the session
    attention: bool = True  # each query reads the whole prefix
    followers: bool = True  # counts of what directly followed an item in training
    companions: Count = 3  # counts of what stood up to so many places from it, before or after; 0: none
    repeat: bool = True  # an item of the prefix again
    popularity: bool = True  # training events of an item raise its score
    whitening: bool = True  # of the exported vectors, fitted on the training items; false: only centred and scaled


class SbrConfig(Section):
    """The session model. Every baseline is trained beside it, on the same data, with the same settings."""

    dim: Positive = 64
    components: Positive | None = 64  # of each half of the vectors, the largest directions (PCA), so many at most; null: all
    epochs: Positive = 6  # at most; the learning rate falls to zero over them
    batch: Positive = 128  # sessions a step, over all processes together; one longer than data.max_prefix counts as several
    lr: Rate = 3e-3
    weight_decay: Weight = 1e-4
    content_decay: Weight = 0.5  # weight decay of the matrix that reads the vectors: what of them tells nothing of sessions fades
    id_dropout: Share = 0.2  # share of the items whose id is hidden in a training step, as a new item's is
    dropout: Share = 0.2  # in the models of the literature (GRU4Rec, NARM, SR-GNN, SASRec)
    select: Literal["HR@10", "HR@20", "MRR@10", "MRR@20", "NDCG@10", "NDCG@20"] = "MRR@20"  # on validation: which epoch is taken
    patience: Positive = 3  # epochs without a better one before it stops
    # softmax over all items, or sampled; auto: sampled above 5,000 items; gbce: binary cross-entropy of sampled items (gSASRec)
    loss: Literal["auto", "softmax", "sampled", "gbce"] = "auto"
    negatives: Positive = 2048  # items drawn for a step, where the loss is sampled or gbce
    calibration: Fraction = 0.75  # t of gbce: 0 is plain binary cross-entropy; 1 gives probabilities as if no item had been left out
    own_loss: Weight = 0.0  # weight of the loss of each channel of our model, ids and vectors, on its own
    parts: PartsConfig = PartsConfig()
    precision: Literal["no", "bf16"] = "no"  # bf16: matrix products of the training in bfloat16, for GPUs that have it
    seeds: Positive = 1  # runs of each trained model; the table gives mean and std, the first is published
    index: str = "auto"  # auto: by the catalogue's size; flat (exact), hnsw, ivf, or a factory string of FAISS; `tpad index` changes it
    # those that are trained: of recommender/models also e.g. SASRec, SASRec on vectors. The first of full, ID-only is published
    models: list[str] = ["ID-only", "content-only", "full"]

    @field_validator("models")
    @classmethod
    def with_one_to_publish(cls, value: list[str]) -> list[str]:
        if not {"full", "ID-only"} & set(value):
            raise ValueError("must contain full or ID-only, which is what is published")
        return value


class Config(Section):
    seed: Seed = 0
    data: DataConfig = DataConfig()
    shop: ShopConfig = ShopConfig()
    backbone: BackboneConfig = BackboneConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    sbr: SbrConfig = SbrConfig()

    @model_validator(mode="after")
    def _moves(self) -> "Config":
        if self.backbone.dtype != "float32" and self.backbone.lora is None and self.distill.variant != "frozen":
            what = "`backbone.dtype` = '{dtype}' with `backbone.lora` = None: every weight trains, and small steps are lost in it"
            raise PydanticCustomError("sections", what, {"dtype": self.backbone.dtype})
        return self


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """The settings of `path` (None: the defaults) with `a.b=value` overrides on top.

    Raises `UserError` (2) that lists every mistake of the file and the overrides.
    """
    tree: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    if path is not None:
        tree, lines = read(path)
    where = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides or []:
        key, sign, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not sign or not all(keys):
            raise UserError(f"--set {override!r} is not of the form a.b=value (command line); write e.g. sbr.epochs=5", USAGE)
        value, _ = parse(text, f"--set {override}")
        _put(tree, keys, value, override)
        above = {keys[:n]: f"--set {override}" for n in range(1, len(keys))}  # for a section that only the override names
        where = above | {k: w for k, w in where.items() if k[: len(keys)] != keys} | {keys: f"--set {override}"}
    return _validated(Config, tree, where, str(path or "settings"))


def altered(config: Config, name: str, **sections: Any) -> Config:
    """A copy with other sections. Raises `UserError` (2) in which the result goes by `name`, where sections do not go together."""
    return _validated(Config, config.model_copy(update=sections).model_dump(), {}, name)


def load_section(model: type[S], path: Path) -> S:
    """A file that is one `model`, read as settings are. Raises `UserError` (2) that lists every mistake."""
    tree, lines = read(path)
    return _validated(model, tree, {key: f"{path}:{line}" for key, line in lines.items()}, str(path))


def _validated(model: type[S], tree: dict[str, Any], where: dict[tuple[str, ...], str], name: str) -> S:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(error, where, name, model)), USAGE) from None


def save_config(config: Config, path: Path) -> None:
    path.write_text(written(config.model_dump()), encoding="utf-8")


def _put(tree: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"`{key}` holds a value, not a section (--set {override}); set it whole", USAGE)
    tree[keys[-1]] = value


def _explain(error: ValidationError, where: dict[tuple[str, ...], str], name: str, model: type[Section]) -> Iterator[str]:
    for problem in error.errors():
        loc = tuple(str(part) for part in problem["loc"])
        spot = next((where[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in where), name)
        key = ".".join(loc)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], _fields(model, loc[:-1]), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(_fields(model, loc[:-1]))}"
            yield f"unknown key `{key}` ({spot}); {hint}"
        elif not loc:  # what two sections say together
            yield f"{problem['msg']} ({spot}); change one of them"
        else:
            yield f"`{key}` = {_short(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]} ({spot}); fix the value"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields(model: Any, loc: tuple[str, ...]) -> list[str]:
    for part in loc:
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)), None)
        if model is None:
            return []
    return list(model.model_fields)
