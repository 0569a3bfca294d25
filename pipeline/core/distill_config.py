"""The settings of `tpad distill`: the section `distill` of `config.py`."""

from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.core.section import Batch, Count, Few, Positive, Prefix, Rate, Section, Share, Weight, Width, Workers


class PhaseConfig(Section):
    """Settings that all training phases share."""

    steps: Count = Field(description="training steps")
    batch: Batch = Field(description="items or sessions in a step, over all processes together")
    lr: Rate = Field(default=1e-3, description="peak learning rate of AdamW")
    warmup: Share = Field(default=0.05, description="share of the steps in which the learning rate rises to its peak; cosine decay follows")
    weight_decay: Weight = Field(default=0.01, description="weight decay of AdamW")
    clip: Rate = Field(default=1.0, description="largest gradient norm; larger gradients are scaled down to it")


class KnowledgeConfig(PhaseConfig):
    """Stage 1: knowledge acquisition, which trains the Knowledge-MLLM K on item instructions."""

    steps: Count = Field(default=150, description="training steps")
    batch: Batch = Field(default=64, description="items in a step, over all processes together")
    generation: Weight = Field(default=1.0, description="weight of L_gen, the loss of generating an item's attributes")
    view: Weight = Field(
        default=0.5, description="weight of L_view, InfoNCE between two views of an item with the image or the text withheld"
    )
    temperature: Rate = Field(default=0.1, description="temperature of L_view")


class TransferConfig(PhaseConfig):
    """Stage 2, first half: trains the Transfer-MLLM T on blocks of items and on session instructions."""

    steps: Count = Field(default=300, description="training steps")
    batch: Batch = Field(
        default=128, description="items of a block, over all processes together: half of them whole sessions, half at random"
    )
    window: Prefix = Field(default=1, description="largest distance in a session of two items that count as a pair, as 1 / distance")
    popularity: Share = Field(
        default=0.25, description="share of an item's popularity that t(v) need not express: 0 for all in t(v), 1 for none"
    )
    sessions: Count = Field(default=16, description="session prompts in a step, over all processes together; 0: none")
    session: Weight = Field(default=0.5, description="weight of the next-item cross-entropy of the session prompts")
    lr: Rate = Field(default=3e-3, description="peak learning rate of AdamW")
    start: Literal["knowledge", "base"] = Field(
        default="knowledge", description="initial weights of T: those of K (knowledge) or of the untrained backbone (base)"
    )
    items: Prefix = Field(
        default=4, description="items in a window of a session, drawn at random; the next item is the target after each of them"
    )
    retrieval: Weight = Field(default=1.0, description="weight of the cross-entropy of the transitions within a block, in either direction")
    generation: Weight = Field(default=0.2, description="weight of generating the next item's text (data.text)")
    disentangle: Weight = Field(default=0.05, description="weight of vCLUB-S between transition t(v) and content c(v), per dimension")
    withhold_text: Share = Field(
        default=0.15, description="share of the items shown by their image alone, so that T also learns what the text does not say"
    )
    withhold_image: Share = Field(default=0.05, description="share of the items shown by their text alone")
    tie: Weight = Field(default=0.2, description="weight of InfoNCE between content c(v) and knowledge k(v)")
    temperature: Rate = Field(default=0.1, description="temperature of the InfoNCE of `tie`")
    summary: Count = Field(
        default=0,
        description="blocks of `items` earlier items, at most, that K sums up in a text shown before the window (MLLM-MSR); 0: none",
    )
    summary_tokens: Positive = Field(default=24, description="longest summary in tokens")
    intent: Weight = Field(
        default=0.0, description="weight of generating the attributes that most items of the session have in common; 0: off"
    )
    teacher: str | None = Field(
        default=None, description="run folder whose session model gives soft next-item targets (P2Rec); null: no teacher"
    )
    soft: Weight = Field(default=0.5, description="weight of the KL divergence from the teacher's next-item distribution")


class AlignConfig(PhaseConfig):
    """Stage 2, second half: transitional pattern alignment, which turns K into the unified MLLM."""

    steps: Count = Field(default=100, description="training steps")
    batch: Batch = Field(default=128, description="items in a step, over all processes together")
    lr: Rate = Field(default=2e-3, description="peak learning rate of AdamW")
    align: Weight = Field(default=1.0, description="weight of the lower bound of the mutual information of p(v) and t(v)")
    bound: Literal["info_nce", "smile"] = Field(
        default="info_nce",
        description="the lower bound: InfoNCE of cosines over a temperature (info_nce), or SMILE with a learned critic (smile)",
    )
    temperature: Rate = Field(default=0.07, description="temperature of InfoNCE and of the relation loss")
    relation: Weight = Field(
        default=1.0, description="weight of the relation loss, which copies the similarities of the batch's items under t(v) to p(v)"
    )
    generation: Weight = Field(default=0.2, description="weight of L_gen, the loss of generating an item's attributes")
    token_distill: Weight = Field(
        default=0.0,
        description="weight of the KL divergence from T's token distribution in generation (LLaVA-KD); 0: off, and T is not kept in memory",
    )
    withhold_text: Share = Field(default=0.15, description="share of the items shown by their image alone")
    withhold_image: Share = Field(default=0.15, description="share of the items shown by their text alone")
    keep: Weight = Field(default=1.0, description="weight of the cosine distance of knowledge k(v) to its value after stage 1")
    disentangle: Weight = Field(default=0.2, description="weight of vCLUB-S between transition p(v) and knowledge k(v), per dimension")


class CriticConfig(Section):
    """The critics of the CLUB and SMILE bounds: networks trained on detached features with an optimiser of their own."""

    hidden: Width = Field(default=128, description="hidden size of a critic")
    lr: Rate = Field(default=2e-3, description="learning rate of the critics")
    inner_steps: Few = Field(default=2, description="critic steps in each training step")
    warmup: Count = Field(default=30, description="training steps before a bound enters the loss")


class ProbeConfig(Section):
    """Measures the bounds on items outside the step's batch, logged as held_out_..., since critics can memorise the batch."""

    every: Count = Field(default=50, description="steps between two measurements; 0: never")
    items: Positive = Field(default=256, description="largest number of items measured on")


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
    "closed_form",
]


class MergeConfig(Section):
    """How the variant `merge` combines the weights of K and T."""

    method: Literal["cat", "svd"] = Field(
        default="cat",
        description="how adapters are combined: concatenated, which is exact (cat), or reduced to the rank of either by SVD (svd)",
    )
    knowledge: Weight = Field(default=0.5, description="weight of K's change to the backbone")
    transfer: Weight = Field(default=0.5, description="weight of T's change to the backbone")

    @field_validator("method", mode="before")
    @classmethod
    def whole_products(cls, value: Any) -> Any:
        if value in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
            raise ValueError("would combine the factors A and B of the adapters separately, not their products; take cat or svd")
        return value


class DistillConfig(Section):
    """Training of the MLLM: `tpad distill`."""

    dim: Width = Field(default=64, description="dimension of the knowledge embedding k(v), and of the transition embedding p(v)")
    refit: bool = Field(
        default=False,
        description="train a second MLLM on all sessions, whose embeddings the published session model reads (with sbr.refit)",
    )
    variant: VariantName = Field(
        default="full",
        description="ablation: full is the whole method; the no_... variants leave one part out; knowledge and transfer are K and T alone; "
        "side_by_side and merge combine K and T without alignment; frozen trains the heads only; closed_form trains nothing",
    )
    merge: MergeConfig = MergeConfig()
    checkpoint_every: Positive = Field(default=100, description="steps between two checkpoints")
    workers: Workers = Field(default=0, description="processes that decode images and tokenise ahead; 0: in the training process")
    vision_cache_gb: Weight = Field(
        default=0.0,
        description="disk space in GB for the outputs of a frozen vision tower, computed once for all phases and the export; 0: no cache",
    )
    chunk: Positive | None = Field(
        default=None,
        description="sequences in one forward pass of a process (GradCache): less memory for the same gradient, "
        "at the cost of a second forward pass; null: all",
    )
    log_with: list[str] = Field(default=[], description="accelerate trackers beside metrics.jsonl, e.g. [tensorboard]")
    knowledge: KnowledgeConfig = KnowledgeConfig()
    transfer: TransferConfig = TransferConfig()
    align: AlignConfig = AlignConfig()
    critic: CriticConfig = CriticConfig()
    probe: ProbeConfig = ProbeConfig()
