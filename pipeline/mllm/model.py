"""The multimodal LLM: a picture and a text become a vector here.

`Mllm` is the backbone with named linear heads on the last hidden states, over the sequences that `Encoder` makes. Of all batches of a
step, each distinct picture goes through the vision tower once.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import GenerationConfig

from pipeline.core.errors import ARTIFACT, UserError
from pipeline.mllm.processor import Encoded, Encoder
from pipeline.mllm.token_batches import cut
from pipeline.mllm.vision_tower import Seen, see

MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # of a batch, those the base model takes as they are
FIRST_SCALE, MAX_SCALE = 4.0, 100.0  # of the session head's logits: soft at first, while the features still say little


class Mllm(nn.Module):
    """Backbone with named heads, each a LayerNorm and a linear map d -> D, in fp32.

    One `forward` takes all batches of a training step, so a distributed wrapper sees one forward and one backward.
    The head "session" asks for an item, and carries a learned scale (one over the temperature). A teacher is the same
    backbone under other values of what trains: of LoRA only the adapters are held twice, without it the whole model.
    """

    def __init__(self, backbone: Any, heads: Sequence[str], dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) for name in heads})
        if "session" in heads:
            self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.teacher: dict[str, Tensor] | None = None  # frozen, of the backbone

    def keep_scale(self) -> None:
        """To call after each step. Clamped where it stands, as CLIP's: clamped in `forward` it had no gradient to come back by."""
        if hasattr(self, "log_scale"):
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def forward(self, batches: dict[str, dict[str, Tensor]], heads: dict[str, Sequence[str]]) -> dict[str, Tensor]:
        """Per batch b and head h: "b.h" (R, D), fp32, L2-normalised ("session": times the scale).

        Where the batch has answers also "b.nll", their summed token loss, and in training with a teacher "b.divergence", the
        sum over their tokens of KL(teacher's distribution || the model's). "b.intent_nll" is that token loss of its intents.
        """
        out = {}
        taught = self._taught(batches) if self.training and self.teacher is not None else {}
        for name, states in self.hidden(batches).items():
            batch = batches[name]
            read = pooled(states, batch)
            for head in heads[name]:
                out[f"{name}.{head}"] = F.normalize(self.heads[head](read), dim=-1)
                if head == "session":
                    out[f"{name}.{head}"] = out[f"{name}.{head}"] * self.log_scale.exp()
            if len(batch["answers"]):
                logits = self._logits(states, batch)
                out[f"{name}.nll"] = F.cross_entropy(logits, batch["answers"], reduction="sum")
                if name in taught:
                    out[f"{name}.divergence"] = F.kl_div(logits.log_softmax(-1), taught[name], reduction="sum", log_target=True)
            if len(batch["intents"]):
                logits = self._logits(states, batch, "intent_at")
                out[f"{name}.intent_nll"] = F.cross_entropy(logits, batch["intents"], reduction="sum")
        return out

    def _logits(self, states: Tensor, batch: dict[str, Tensor], at: str = "answer_at") -> Tensor:
        """(A, V) fp32, of the answers or the intents"""
        logits: Tensor = self.backbone.get_output_embeddings()(states[batch[at]])
        return logits.float()

    def _taught(self, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """By batch with answers, (A, V): their log-probabilities under the teacher, without dropout."""
        assert self.teacher is not None
        own = {name: weight.data for name, weight in trainable_state(self.backbone).items()}
        self.eval()
        try:
            _put(self.backbone, self.teacher)
            with torch.no_grad():
                states = self.hidden(batches)
                return {n: self._logits(s, batches[n]).log_softmax(-1) for n, s in states.items() if len(batches[n]["answers"])}
        finally:
            _put(self.backbone, own)
            self.train()

    def turn(self, head: str, directions: Tensor) -> None:
        """Lets a head that has learned nothing yet read these directions (n <= D, d) first."""
        with torch.no_grad():
            self.heads[head][1].weight[: len(directions)] = directions  # type: ignore[index]

    def centre(self, head: str, mean: Tensor) -> None:
        """Shifts a new head so that `mean` (D,), the mean of its raw outputs, becomes zero."""
        with torch.no_grad():
            self.heads[head][1].bias.sub_(mean)  # type: ignore[index]

    def hidden(self, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """By batch, (B * L, d): last hidden states of the base model, without the language-model head."""
        model, states = self.backbone.model, {}
        seen = see(model, batches)
        for name, batch in batches.items():
            if name in ("pictures", "kept"):
                continue
            inputs = _inputs(batch, seen) | {"position_ids": batch.get("position_ids")}
            states[name] = model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return states

    def write(self, batches: dict[str, dict[str, Tensor]], name: str, greedy: GenerationConfig) -> Tensor:
        """(B, at most n) token ids that the language model goes on with after each sequence of a batch."""
        batch = batches[name]
        length = batch["input_ids"].shape[1]
        empty = length - batch["attention_mask"].sum(1)
        left = {of: torch.stack([row.roll(int(n)) for row, n in zip(batch[of], empty, strict=True)]) for of in MODEL_INPUTS if of in batch}
        inputs = _inputs(batch | left, see(self.backbone.model, batches))
        written: Tensor = self.backbone.generate(**inputs, generation_config=greedy)
        return written[:, length:]


def pooled(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(R, d) fp32, the features h of a batch from its hidden states (B * L, d): of a token each, or means over tokens."""
    read = states[batch["read_at"]].float()
    if len(read) == len(over := batch["read_over"]):
        return read
    return torch.segment_reduce(read, "mean", lengths=over, unsafe=True)  # adds in one order, also on a GPU


def _inputs(batch: dict[str, Tensor], seen: Seen | None) -> dict[str, Any]:
    """A batch as the backbone takes it, `seen` being what the vision tower makes of the distinct pictures."""
    inputs: dict[str, Any] = {of: batch[of] for of in MODEL_INPUTS if of in batch}
    if seen is not None and len(batch["picture_at"]):
        shown = seen.of(batch["picture_at"])
        inputs["mm_encoder_outputs"] = {"image": shown}
        if shown.grid is not None:
            inputs["image_grid_thw"] = shown.grid
    return inputs


class SideBySide(nn.Module):
    """One model a half, each asked in a pass of its own: what the unified MLLM is held against."""

    def __init__(self, halves: dict[str, Mllm]) -> None:
        super().__init__()
        self.halves = nn.ModuleDict(halves)

    def forward(self, batches: dict[str, dict[str, Tensor]], heads: dict[str, Sequence[str]]) -> dict[str, Tensor]:
        """As that of an `Mllm`."""
        out: dict[str, Tensor] = {}
        for half, mllm in self.halves.items():
            out |= mllm(batches, {name: [half] for name, asked in heads.items() if half in asked})
        return out


def embed(
    mllm: Mllm, encoder: Encoder, sequences: Sequence[Encoded], heads: Sequence[str], token_budget: int, device: Any
) -> dict[str, np.ndarray]:
    """By head, the (n, D) features of n sequences with one read each, in their order."""
    places = cut(np.array([len(s) for s in sequences]), token_budget)
    batches = (encoder.collate({"items": [sequences[n] for n in at]}) for at in places)
    return embed_batches(mllm, places, batches, heads, device)


def embed_batches(
    mllm: Mllm, places: Sequence[np.ndarray], batches: Iterable[dict[str, dict[str, Tensor]]], heads: Sequence[str], device: Any
) -> dict[str, np.ndarray]:
    """The same, of sequences that come in batches: those at `places`, as `cut` gives them, and then any number that do not count."""
    features: dict[str, list[Tensor]] = {head: [] for head in heads}
    with torch.no_grad():  # what `fsdp.py` first puts together in inference mode, no later step could use
        for tensors in batches:
            out = mllm(send_to_device(tensors, device), {"items": heads})
            for head in heads:
                features[head].append(out[f"items.{head}"].cpu())
    order = np.argsort(np.concatenate(places))
    return {head: torch.cat(found).numpy()[order] for head, found in features.items()}


def trainable_state(module: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes: every weight of the tiny model, adapters and heads of a large one."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """These as the values of what trains; nothing is copied."""
    for name, weight in trainable_state(module).items():
        weight.data = tensors[name]


def load_trainable(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Puts back what `trainable_state` gave; every trainable weight must be there, in its shape."""
    own = trainable_state(module)
    odd = sorted(own.keys() ^ tensors.keys()) or [name for name in own if own[name].shape != tensors[name].shape]
    if odd:
        raise UserError(f"weights do not fit the model, e.g. `{odd[0]}` ({where}); run `tpad distill` again", ARTIFACT)
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(tensors[name])
