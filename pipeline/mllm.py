"""The multimodal LLM: parts in, features out.

`Encoder` turns prompt parts into token ids and image tensors; `Mllm` is the backbone with named linear heads on the last
hidden state. Of all batches of a step, each distinct picture goes through the vision tower once.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from pipeline.artifact import write_json
from pipeline.backbone import Backbone, adapted, from_config, published_backbone, weights_sha256
from pipeline.catalog import Catalog
from pipeline.config import BackboneConfig
from pipeline.errors import ARTIFACT, USAGE, UserError
from pipeline.families import FAMILIES, Processor
from pipeline.prompts import Part
from pipeline.vision import Cache, Picture, Seen, join, see

IMAGE_CACHE_BYTES = 1 << 30  # of encoded images kept, so that an epoch after the first decodes nothing
MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # of a batch, those the base model takes as they are
FIRST_SCALE, MAX_SCALE = 4.0, 100.0  # of the session head's logits: soft at first, while the features still say little


@dataclass
class Encoded:
    """One sequence: token ids, the pictures in it, the positions features are read at, and which tokens are answers."""

    ids: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # positions of the tokens to be written
    intents: list[int] = field(default_factory=list)  # and of those that say what a session's items have in common

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Parts of one catalogue's items -> `Encoded` -> padded tensors.

    The backbone's `model_type` picks how an image becomes tokens.
    """

    def __init__(self, config: BackboneConfig, backbone: Backbone, catalog: Catalog, cache_bytes: int = IMAGE_CACHE_BYTES) -> None:
        self.config, self.catalog = config, catalog
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        self.processor = Processor(backbone.model.config, backbone.tokenizer, backbone.image_processor, config.max_pixels)
        family: str = backbone.model.config.model_type
        if family not in FAMILIES:
            raise UserError(f"backbone family `{family}` is not supported (backbone.name); supported: {', '.join(FAMILIES)}", USAGE)
        self.family = FAMILIES[family]
        if config.max_pixels and not self.family.sized:
            raise UserError(
                f"every picture has the same number of tokens in the family `{family}` (max_pixels = {config.max_pixels}); leave it null",
                USAGE,
            )
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self._text: dict[str, list[int]] = {}
        self._most_texts = 2**20 if cache_bytes else 2**12  # some parts of an export, whose texts are measured first and then encoded
        self._pictures: dict[int, Picture] = {}
        self._room = cache_bytes
        self._keys: dict[int, bytes] | None = {} if cache_bytes else None
        self.kept: Cache | None = None  # pictures that need not be decoded
        self.picture_seconds = 0.0  # spent on decoding images and making them what the vision tower takes
        self.head, self.tail = self._frame()

    def _frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a prompt: the chat template's user turn, where the tokenizer has one."""
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer("").input_ids), []
        mark = "@@prompt@@"
        turn = [{"role": "user", "content": [{"type": "text", "text": mark}]}]
        before, _, after = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).partition(mark)
        return self.tokens(before, plain=False), self.tokens(after, plain=False)

    def tokens(self, text: str, plain: bool = True) -> list[int]:
        """Of a text, in which `<image>` and the like are letters (`plain`), or of the frame, in which they are not."""
        found = self._text.get(text)
        if found is None or not plain:
            found = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)
            if len(self._text) >= self._most_texts:
                self._text.clear()
            if plain:
                self._text[text] = found
        return found

    def encode(self, parts: Iterable[Part]) -> Encoded:
        """The sequence of `parts`; an answer ends with the end-of-sequence token."""
        out = Encoded(list(self.head))
        for part in parts:
            if part.kind == "words":
                out.ids += self.tokens(" " + part.text)
            elif part.kind == "text":
                out.ids += self.tokens(" " + part.text)[: self.config.max_text_tokens]
            elif part.kind == "image":
                picture = self.picture(part.row)
                out.ids += picture.ids
                out.pictures.append(picture)
            elif part.kind == "turn":
                out.ids += self.tail
            elif part.kind == "read":
                out.reads.append(len(out.ids) - 1)
            else:
                answer = self.answer(part.text)
                written = out.answers if part.kind == "answer" else out.intents
                written += range(len(out.ids), len(out.ids) + len(answer))
                out.ids += answer
        return out

    def decode(self, ids: Tensor) -> list[str]:
        """(B, n) written tokens -> texts, in one line each."""
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def greedy(self, most: int) -> GenerationConfig:
        """To write at most so many tokens, always the likeliest, and none that stands for something else than text."""
        end = self.tokenizer.eos_token_id
        other = sorted({*self.tokenizer.all_special_ids, self.processor.config.image_token_id} - {end})
        return GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=self.pad, eos_token_id=end, suppress_tokens=other)

    def answer(self, text: str) -> list[int]:
        return [*self.tokens(" " + text)[: self.config.max_text_tokens], self.tokenizer.eos_token_id]

    def length(self, parts: Iterable[Part]) -> int:
        """How long `encode` will make the sequence of an item's parts, known without decoding its image."""
        count = len(self.head)
        for part in parts:
            if part.kind == "words":
                count += len(self.tokens(" " + part.text))
            elif part.kind == "text":
                count += min(len(self.tokens(" " + part.text)), self.config.max_text_tokens)
            elif part.kind == "image":
                count += self.family.tokens(self.processor, self.catalog.image_size(part.row))
            elif part.kind == "turn":
                count += len(self.tail)
        return count

    def key(self, row: int) -> bytes:
        """Of an item's image, by the bytes of its file."""
        found = self._keys.get(row) if self._keys is not None else None
        if found is None:
            found = hashlib.sha256(self.catalog.image_bytes(row) or b"").digest()
            if self._keys is not None:
                self._keys[row] = found
        return found

    def picture(self, row: int) -> Picture:
        """An item's image; held in memory while there is room."""
        if self.kept is not None and (known := self.kept.find(self.key(row))) is not None:
            return known
        found = self._pictures.get(row)
        if found is None:
            began = time.perf_counter()
            image = self.catalog.image(row)
            assert image is not None, "the prompt asked for an image the item lacks"
            ids, tensors = self.family.encode(self.processor, image)
            # in the type that every vision tower begins by casting to: half the bytes to hold and to send
            tensors = {name: t.to(self.model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
            found = Picture(self.key(row), ids, tensors)
            size = sum(t.nbytes for t in tensors.values())
            if size <= self._room:
                self._room -= size
                self._pictures[row] = found
            self.picture_seconds += time.perf_counter() - began
        return found

    def collate(self, batches: Mapping[str, Sequence[Encoded]], round_to: int = 1) -> dict[str, dict[str, Tensor]]:
        """Right-padded tensors of each batch of B sequences of at most L tokens, and the pictures of all of them.

        A batch: `input_ids`, `attention_mask` (B, L); `read_at` (R,) and `answer_at` (A,), flat positions in (B * L) of the
        features to read and of the tokens before each answer token; `answers` (A,); `intent_at` and `intents` likewise;
        `picture_at` (I,), which picture each image in it is, in their order; `position_ids` (3, B, L) where the family has them and
        there are pictures. "pictures": what the vision tower takes for the distinct ones; "kept": what it has made of those,
        numbered after the former, that need not go through it. L is a multiple of `round_to`.
        """
        distinct = {p.key: p for sequences in batches.values() for s in sequences for p in s.pictures}  # in order of their first use
        fresh, kept = ([p for p in distinct.values() if (p.kept is None) == new] for new in (True, False))
        place = {p.key: n for n, p in enumerate([*fresh, *kept])}
        out = {name: self._collate(sequences, place, round_to) for name, sequences in batches.items()}
        out["pictures"] = self.family.stack([p.tensors for p in fresh]) if fresh else {}
        if self.family.beside and fresh:
            out["pictures"] |= self.family.beside(self.model, out["pictures"]["image_grid_thw"])
        return out | ({"kept": join([p.kept for p in kept if p.kept is not None])} if kept else {})

    def _collate(self, sequences: Sequence[Encoded], place: dict[bytes, int], round_to: int) -> dict[str, Tensor]:
        length = math.ceil(max(map(len, sequences)) / round_to) * round_to
        ids = np.full((len(sequences), length), self.pad, np.int64)
        mask = np.zeros((len(sequences), length), np.int64)
        reads, before, answers, before_intents, intents = [], [], [], [], []
        for b, s in enumerate(sequences):
            ids[b, : len(s)], mask[b, : len(s)] = s.ids, 1
            reads += [b * length + at for at in s.reads]
            before += [b * length + at - 1 for at in s.answers]
            answers += [s.ids[at] for at in s.answers]
            before_intents += [b * length + at - 1 for at in s.intents]
            intents += [s.ids[at] for at in s.intents]
        pictures = [place[p.key] for s in sequences for p in s.pictures]
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "read_at": reads,
            "answer_at": before,
            "answers": answers,
            "intent_at": before_intents,
            "intents": intents,
            "picture_at": pictures,
        }
        if self.family.types:
            arrays[self.family.types] = ids == self.processor.config.image_token_id
        batch = {name: torch.as_tensor(np.asarray(value, np.int64)) for name, value in arrays.items()}
        if self.family.positions and pictures:
            batch["position_ids"] = self.family.positions(self.model, batch, torch.cat([p.grid for s in sequences for p in s.pictures]))
        return batch


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

    def forward(self, batches: dict[str, dict[str, Tensor]], heads: dict[str, Sequence[str]]) -> dict[str, Tensor]:
        """Per batch b and head h: "b.h" (R, D), fp32, L2-normalised ("session": times the scale).

        Where the batch has answers also "b.nll", their summed token loss, and in training with a teacher "b.divergence", the
        sum over their tokens of KL(teacher's distribution || the model's). "b.intent_nll" is that token loss of its intents.
        """
        out = {}
        taught = self._taught(batches) if self.training and self.teacher is not None else {}
        for name, states in self.hidden(batches).items():
            batch = batches[name]
            read = states[batch["read_at"]].float()
            for head in heads[name]:
                out[f"{name}.{head}"] = F.normalize(self.heads[head](read), dim=-1)
                if head == "session":
                    out[f"{name}.{head}"] = out[f"{name}.{head}"] * self.log_scale.exp().clamp(max=MAX_SCALE)
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

    def centre(self, head: str, mean: Tensor) -> None:
        """Shifts a new head so that `mean` (D,), the mean of its raw outputs, becomes zero.

        Last hidden states share one large direction: without this every item begins with nearly the same feature, and
        contrastive losses spend their first hundreds of steps on that.
        """
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
    mllm: Mllm,
    encoder: Encoder,
    sequences: Sequence[Encoded],
    heads: Sequence[str],
    token_budget: int,
    device: Any,
    passes: Callable[[int], int] = int,
) -> dict[str, np.ndarray]:
    """By head, the (n, D) features of n sequences with one read each, in their order.

    Batches are cut from the longest to the shortest, so that little is padding, and hold at most `token_budget` tokens.
    `passes` says how many forward passes to make, given how many are needed: as many as all other processes (`fsdp.py`).
    """
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    cut: list[list[int]] = []
    first = 0
    while first < len(order):
        cut.append(order[first : first + max(1, token_budget // len(sequences[order[first]]))])
        first += len(cut[-1])
    features: dict[str, list[Tensor]] = {head: [] for head in heads}
    with torch.no_grad():  # what `fsdp.py` first puts together in inference mode, no later step could use
        for n in range(passes(len(cut))):
            batches = encoder.collate({"items": [sequences[at] for at in cut[min(n, len(cut) - 1)]]})
            out = mllm({of: {name: t.to(device) for name, t in batch.items()} for of, batch in batches.items()}, {"items": heads})
            for head in heads if n < len(cut) else ():
                features[head].append(out[f"items.{head}"].cpu())
    place = np.argsort(order)
    return {head: torch.cat(found).numpy()[place] for head, found in features.items()}


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


# --- saving, loading


def save_mllm(folder: Path, model: Mllm | SideBySide, backbone: Backbone, settings: dict[str, Any]) -> None:
    """The trained weights, the backbone's config, tokenizer and image processor, and `settings` to build it again."""
    backbone.model.config.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    backbone.image_processor.save_pretrained(folder)
    save_file({name: p.detach().cpu().contiguous() for name, p in trainable_state(model).items()}, folder / "weights.safetensors")
    write_json(folder / "mllm.json", settings)


def load_mllm(
    folder: Path, config: BackboneConfig | None = None, merge: bool = False
) -> tuple[Mllm | SideBySide, Backbone, dict[str, Any]]:
    """What `save_mllm` wrote (its files must have been verified): model, backbone, settings.

    `config` overrides settings of the backbone that no weight depends on; `merge` puts adapters into the weights they
    adapt: the same model, to be used and not trained.
    """
    settings = json.loads((folder / "mllm.json").read_text(encoding="utf-8"))
    config = config or BackboneConfig.model_validate(settings["backbone"])
    if (known := settings.get("weights_sha256")) and known != weights_sha256(config):
        raise UserError(
            f"the weights of the backbone are not those the MLLM was distilled on (backbone.name = {config.name}); put them back, or run "
            "`tpad distill` again",
            ARTIFACT,
        )
    backbone = _saved_backbone(folder, config)
    mllm: Mllm | SideBySide
    if settings.get("side_by_side"):
        other = _saved_backbone(folder, config)
        models = zip(settings["heads"], (backbone, other), strict=True)
        mllm = SideBySide({half: Mllm(of.model, [half], settings["dim"]) for half, of in models})
    else:
        mllm = Mllm(backbone.model, settings["heads"], settings["dim"])
    load_trainable(mllm, load_file(folder / "weights.safetensors"), str(folder / "weights.safetensors"))
    if merge and not config.quantize:  # which 4 bits would round
        merge_adapters(mllm)
    return mllm, backbone, settings


def _saved_backbone(folder: Path, config: BackboneConfig) -> Backbone:
    """As it was before training, with adapters to be filled."""
    if config.name != "tiny":
        return adapted(published_backbone(config), config)
    model = from_config(AutoConfig.from_pretrained(folder), config)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return adapted(Backbone(model, AutoTokenizer.from_pretrained(folder), processor), config)


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter into the weight it adapts, in its place: the same model, faster."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
