"""Defines the multimodal LLM. Here an image and a text become a vector.

`Mllm` is the backbone with named linear heads on the last hidden states of the sequences of `PromptProcessor`. Each distinct image
of a step goes through the vision tower once, however many batches show it.
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
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.token_batches import cut
from pipeline.mllm.vision_tower import VisionFeatures, run_vision_tower

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "vectors",
)  # tensors of a batch that the base model takes unchanged
SCALED = {"session", "query"}  # heads of queries: their features hold the learned scale of the logits
STATE = "state"  # in place of a head's name: h(v) itself
FIRST_SCALE, MAX_SCALE = 4.0, 100.0  # scale of the session head's logits: small at first, while the features are still poor


class Mllm(nn.Module):
    """A backbone with named heads, each a LayerNorm and a linear map d -> D, in fp32.

    One `forward` takes all batches of a training step, so that a distributed wrapper sees one forward and one backward pass.
    The head "session" gives the query for the next item, and has a learned scale (the inverse temperature). A teacher is the same
    backbone with other values of the trainable weights: with LoRA only the adapters are held twice, without it the whole model.
    """

    def __init__(self, backbone: Any, heads: Sequence[str], dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) for name in heads})
        if SCALED & set(heads):
            self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.teacher: dict[str, Tensor] | None = None  # frozen values of the trainable weights of the backbone

    def keep_scale(self) -> None:
        """Clamps the learned scale, as CLIP does; to be called after each step. Clamped in `forward`, it would have no gradient."""
        if hasattr(self, "log_scale"):
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def forward(self, batches: dict[str, dict[str, Tensor]], heads: dict[str, Sequence[str]]) -> dict[str, Tensor]:
        """Returns for batch b and head h the features "b.h" (R, D), fp32, L2-normalised ("session": times the scale).

        For batches with answers also "b.nll", the summed token loss, and in training with a teacher "b.divergence", the sum over
        the answer tokens of KL(teacher || model). "b.intent_nll" is the summed token loss of the intents.
        """
        out = {}
        taught = self._taught(batches) if self.training and self.teacher is not None else {}
        for name, states in self.hidden(batches).items():
            batch = batches[name]
            read = pooled(states, batch)
            for head in heads[name]:
                if head == STATE:
                    out[f"{name}.{head}"] = read
                    continue
                out[f"{name}.{head}"] = F.normalize(self.heads[head](read), dim=-1)
                if head in SCALED:
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

    def _logits(self, states: Tensor, batch: dict[str, Tensor], positions: str = "answer_at") -> Tensor:
        """Returns the logits (A, V) in fp32 of the answers or of the intents."""
        logits: Tensor = self.backbone.get_output_embeddings()(states[batch[positions]])
        return logits.float()

    def _taught(self, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns by batch with answers the teacher's log-probabilities (A, V), without dropout."""
        assert self.teacher is not None
        student = {name: weight.data for name, weight in trainable_state(self.backbone).items()}
        self.eval()
        try:
            _put(self.backbone, self.teacher)
            with torch.no_grad():
                states = self.hidden(batches)
                return {n: self._logits(s, batches[n]).log_softmax(-1) for n, s in states.items() if len(batches[n]["answers"])}
        finally:
            _put(self.backbone, student)
            self.train()

    def turn(self, head: str, directions: Tensor) -> None:
        """Sets the first rows of an untrained head's weight to `directions` (n <= D, d)."""
        with torch.no_grad():
            self.heads[head][1].weight[: len(directions)] = directions  # type: ignore[index]

    def set_head(self, head: str, linear: Tensor) -> None:
        """Sets a head to an affine map (n <= D, d + 1) of the layer-normed states, the offset last; the other rows are zero."""
        with torch.no_grad():
            norm, layer = self.heads[head].children()
            assert isinstance(norm, nn.LayerNorm) and isinstance(layer, nn.Linear)
            norm.reset_parameters()
            for parameter, value in ((layer.weight, linear[:, :-1]), (layer.bias, linear[:, -1])):
                parameter.zero_()[: len(linear)] = value

    def centre(self, head: str, mean: Tensor) -> None:
        """Shifts an untrained head so that `mean` (D,), the mean of its raw outputs, becomes zero."""
        with torch.no_grad():
            self.heads[head][1].bias.sub_(mean)  # type: ignore[index]

    def hidden(self, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns by batch the last hidden states (B * L, d) of the base model, without the language-model head."""
        model, states = self.backbone.model, {}
        features = run_vision_tower(model, batches)
        for name, batch in batches.items():
            if name in ("images", "cached"):
                continue
            inputs = _inputs(batch, features) | {"position_ids": batch.get("position_ids")}
            states[name] = model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return states

    def write(self, batches: dict[str, dict[str, Tensor]], name: str, greedy: GenerationConfig) -> Tensor:
        """Generates (B, at most n) token ids after each sequence of a batch."""
        batch = batches[name]
        length = batch["input_ids"].shape[1]
        padding = length - batch["attention_mask"].sum(1)
        names = [name for name in MODEL_INPUTS if name in batch]
        left = {name: torch.stack([row.roll(int(n)) for row, n in zip(batch[name], padding, strict=True)]) for name in names}
        inputs = _inputs(batch | left, run_vision_tower(self.backbone.model, batches))
        generated: Tensor = self.backbone.generate(**inputs, generation_config=greedy)
        return generated[:, length:]


def pooled(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Pools the hidden states (B * L, d) of a batch to its features h (R, d), fp32: those of one token, or means over tokens."""
    read = states[batch["read_at"]].float()
    if len(read) == len(counts := batch["read_over"]):
        return read
    return torch.segment_reduce(read, "mean", lengths=counts, unsafe=True)  # adds in a fixed order, also on a GPU


def summed_states(mllm: Mllm, ids: Sequence[int]) -> Tensor:
    """Returns the sum (d,) of the last hidden states of tokens at the beginning of a sequence, which do not depend on what follows."""
    with torch.inference_mode():
        states: Tensor = mllm.backbone.model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state
    return states[0].float().sum(0)


def _inputs(batch: dict[str, Tensor], features: VisionFeatures | None) -> dict[str, Any]:
    """Returns the arguments of the base model for a batch; `features` are those of the distinct images of the step."""
    inputs: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if features is not None and len(batch["image_at"]):
        shown = features.select(batch["image_at"])
        inputs["mm_encoder_outputs"] = {"image": shown}
        if shown.grid is not None:
            inputs["image_grid_thw"] = shown.grid
    return inputs


class SideBySide(nn.Module):
    """Two MLLMs, one for each half of the embedding, run one after the other: the ablation `side_by_side`."""

    def __init__(self, halves: dict[str, Mllm]) -> None:
        super().__init__()
        self.halves = nn.ModuleDict(halves)

    def forward(self, batches: dict[str, dict[str, Tensor]], heads: dict[str, Sequence[str]]) -> dict[str, Tensor]:
        """Returns what `Mllm.forward` returns, each head from its model."""
        out: dict[str, Tensor] = {}
        for half, mllm in self.halves.items():
            out |= mllm(batches, {name: [half] for name, wanted in heads.items() if half in wanted})
        return out


def embed(
    mllm: Mllm, processor: PromptProcessor, sequences: Sequence[Encoded], heads: Sequence[str], token_budget: int, device: Any
) -> dict[str, np.ndarray]:
    """Returns by head the features (n, D) of n sequences with one read each, in their order."""
    places = cut(np.array([len(s) for s in sequences]), token_budget)
    batches = (processor.collate({"items": [sequences[n] for n in positions]}) for positions in places)
    return embed_batches(mllm, places, batches, heads, device)


def embed_batches(
    mllm: Mllm, places: Sequence[np.ndarray], batches: Iterable[dict[str, dict[str, Tensor]]], heads: Sequence[str], device: Any
) -> dict[str, np.ndarray]:
    """Returns the features of sequences that are batched already: `places` are the positions in each batch, as `cut` gives them.

    Batches after those of `places` are run and their features are left out.
    """
    features: dict[str, list[Tensor]] = {head: [] for head in heads}
    with torch.no_grad():  # not inference mode: weights that FSDP gathers there first could not be used in training
        for tensors in batches:
            out = mllm(send_to_device(tensors, device), {"items": heads})
            for head in heads:
                features[head].append(out[f"items.{head}"].cpu())
    order = np.argsort(np.concatenate(places))
    return {head: torch.cat(parts).numpy()[order] for head, parts in features.items()}


def stop_after(mllm: nn.Module, count: int) -> None:
    """Removes the layers above the first `count`. DeepStack still adds its features to the layers that stay."""
    for module in mllm.modules():
        if isinstance(module, Mllm):
            decoder = module.backbone.model.get_decoder()
            decoder.layers = decoder.layers[:count]


def trainable_state(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights that train, by name: all of the tiny model, adapters and heads of a large one."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Sets the values of the trainable weights to `tensors`, without copying."""
    for name, weight in trainable_state(module).items():
        weight.data = tensors[name]


def load_trainable(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Loads the weights of `trainable_state` from the file `where`. Raises `UserError` (4) unless names and shapes are the model's."""
    weights = trainable_state(module)
    wrong = sorted(weights.keys() ^ tensors.keys()) or [name for name in weights if weights[name].shape != tensors[name].shape]
    if wrong:
        raise UserError(f"weights do not fit the model, e.g. `{wrong[0]}` ({where}); run `tpad distill` again", ARTIFACT)
    if infinite := [name for name in weights if not tensors[name].isfinite().all()]:
        raise UserError(f"weights are not finite, e.g. `{infinite[0]}` ({where}); run `tpad distill` again", ARTIFACT)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
