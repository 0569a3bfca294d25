"""Turns prompt parts into token ids and padded batches: the input of the MLLM.

What an image is, pixels or cached vision features, is decided in `item_images.py`.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from pipeline.core.config import BackboneConfig
from pipeline.data.catalog import Catalog
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.item_images import IMAGE_CACHE_BYTES, ModelImages
from pipeline.mllm.prompts import PromptPart
from pipeline.mllm.vision_cache import VisionCache
from pipeline.mllm.vision_tower import ImageInput, join


@dataclass
class Encoded:
    """One sequence: its token ids, its images, the positions at which features are read, and those of the tokens to generate."""

    ids: list[int] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)
    reads: list[range] = field(default_factory=list)  # by feature, the positions whose hidden states are averaged
    answers: list[int] = field(default_factory=list)  # positions of answer tokens
    intents: list[int] = field(default_factory=list)  # positions of the tokens of a session's intent

    def __len__(self) -> int:
        return len(self.ids)


def turn(tokenizer: Any) -> tuple[str, str] | None:
    """Returns what the chat template has before and after the words of the user; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "@@prompt@@"
    said = [{"role": "user", "content": [{"type": "text", "text": mark}]}]
    before, _, after = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True).partition(mark)
    return before, after


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the token ids before and after a prompt: the chat template's user turn, or what the tokenizer begins a text with."""
    around = turn(tokenizer)
    if around is None:
        return list(tokenizer("").input_ids), []
    before, after = (list(tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids) for text in around)
    return before, after


class PromptProcessor:
    """Turns prompt parts of one catalogue's items into `Encoded` sequences, and these into padded tensors.

    `cache_bytes` bounds the preprocessed images held in memory; 0 suits a single pass over the catalogue. Images whose vision features
    are in `vision_cache` are not decoded. Raises `UserError` (2) for a backbone of an unknown family.
    """

    def __init__(
        self,
        config: BackboneConfig,
        backbone: Backbone,
        catalog: Catalog,
        cache_bytes: int = IMAGE_CACHE_BYTES,
        vision_cache: VisionCache | None = None,
    ) -> None:
        self.config, self.catalog = config, catalog
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        self.images = ModelImages(config, backbone, catalog, cache_bytes, vision_cache)
        self.backbone_processor, self.family = self.images.backbone_processor, self.images.family
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self._words: dict[str, list[int]] = {}
        self._texts: dict[str, array[int]] = {}
        self._most_texts = 2**20 if cache_bytes else 2**12  # enough for some parts of an export, which tokenises each text twice
        self.head, self.tail = frame(self.tokenizer)

    def tokens(self, text: str, plain: bool = True) -> list[int]:
        """Tokenises a text. `plain`: special tokens such as `<image>` are read as letters, as in the texts of items."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)

    def words(self, text: str) -> list[int]:
        """Tokenises the words of a template; all results are held, since templates are few."""
        if text not in self._words:
            self._words[text] = self.tokens(" " + text)
        return self._words[text]

    def text(self, text: str) -> "array[int]":
        """Tokenises an item's text, cut to `max_text_tokens`; as compact arrays, since a million of them may be held."""
        ids = self._texts.get(text)
        if ids is None:
            ids = array("i", self.tokens(" " + text)[: self.config.max_text_tokens])
            if len(self._texts) >= self._most_texts:
                self._texts.clear()
            self._texts[text] = ids
        return ids

    def cut_texts(self, texts: Sequence[str]) -> int:
        """Returns how many of the texts are longer than `max_text_tokens`."""
        longer = (text for text in texts if len(text) > self.config.max_text_tokens)  # a token has a character at least
        return sum(len(self.tokens(" " + text)) > self.config.max_text_tokens for text in longer)

    def encode(self, parts: Iterable[PromptPart]) -> Encoded:
        """Returns the sequence of `parts`; an answer ends with the end-of-sequence token."""
        out = Encoded(list(self.head))
        for part in parts:
            if part.kind == "words":
                out.ids += self.words(part.text)
            elif part.kind == "text":
                out.ids += self.text(part.text)
            elif part.kind == "image":
                image = self.images.get(part.row)
                out.ids += image.ids
                out.images.append(image)
            elif part.kind == "turn":
                out.ids += self.tail
            elif part.kind == "read":
                out.reads.append(range(self._read_from(out), len(out.ids)))
            else:
                answer = self.answer(part.text)
                written = out.answers if part.kind == "answer" else out.intents
                written += range(len(out.ids), len(out.ids) + len(answer))
                out.ids += answer
        return out

    def _read_from(self, out: Encoded) -> int:
        """Returns the first position of the feature that is read at the end of `out`."""
        if self.config.pooling == "last":
            return len(out.ids) - 1
        return out.reads[-1].stop if out.reads else len(self.head)

    def decode(self, ids: Tensor) -> list[str]:
        """Turns generated tokens (B, n) into B texts of one line."""
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def greedy(self, most: int) -> GenerationConfig:
        """Returns the settings of greedy decoding: at most `most` tokens, none of them a special token."""
        end = self.tokenizer.eos_token_id
        other = sorted({*self.tokenizer.all_special_ids, self.backbone_processor.config.image_token_id} - {end})
        return GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=self.pad, eos_token_id=end, suppress_tokens=other)

    def answer(self, text: str) -> list[int]:
        """Tokenises a text to generate, with the end-of-sequence token."""
        return [*self.text(text), self.tokenizer.eos_token_id]

    def length(self, parts: Iterable[PromptPart]) -> int:
        """Returns the length of the sequence that `encode` will give for an item's parts, without decoding its image."""
        count = len(self.head)
        for part in parts:
            if part.kind == "words":
                count += len(self.words(part.text))
            elif part.kind == "text":
                count += len(self.text(part.text))
            elif part.kind == "image":
                count += self.images.count_tokens(part.row)
            elif part.kind == "turn":
                count += len(self.tail)
        return count

    def collate(self, batches: Mapping[str, Sequence[Encoded]], round_to: int = 1) -> dict[str, dict[str, Tensor]]:
        """Pads each batch of B sequences on the right to a common length L, a multiple of `round_to`, and stacks their images.

        Of a batch: `input_ids`, `attention_mask` (B, L); `read_at` (M,), flat positions in (B * L) whose hidden states are read, and
        `read_over` (R,), how many of them each feature averages; `answers` (A,) and `answer_at` (A,), answer tokens and the flat
        positions before them; `intents` and `intent_at` likewise; `image_at` (I,), the number of each of its images among the
        distinct ones; `position_ids` (3, B, L) in families that have them, if there are images. Of all batches together: "images",
        inputs of the vision tower for the distinct images; "cached", the vision features of those that need not go through it,
        numbered after the former.
        """
        distinct = {i.key: i for sequences in batches.values() for s in sequences for i in s.images}  # in order of their first use
        fresh = [image for image in distinct.values() if image.cached is None]
        cached = [image for image in distinct.values() if image.cached is not None]
        numbers = {image.key: n for n, image in enumerate([*fresh, *cached])}
        out = {name: self._collate(sequences, numbers, round_to) for name, sequences in batches.items()}
        out["images"] = self.family.stack([image.tensors for image in fresh]) if fresh else {}
        if self.family.beside and fresh:
            out["images"] |= self.family.beside(self.model, out["images"]["image_grid_thw"])
        return out | ({"cached": join([image.cached for image in cached if image.cached is not None])} if cached else {})

    def _collate(self, sequences: Sequence[Encoded], numbers: dict[bytes, int], round_to: int) -> dict[str, Tensor]:
        length = math.ceil(max(map(len, sequences)) / round_to) * round_to
        ids = np.full((len(sequences), length), self.pad, np.int64)
        mask = np.zeros((len(sequences), length), np.int64)
        for line, sequence in enumerate(sequences):
            ids[line, : len(sequence)], mask[line, : len(sequence)] = sequence.ids, 1
        arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        arrays["read_at"] = [b * length + position for b, s in enumerate(sequences) for read in s.reads for position in read]
        arrays["read_over"] = [len(read) for s in sequences for read in s.reads]
        for name, before in (("answers", "answer_at"), ("intents", "intent_at")):
            arrays[name] = [s.ids[position] for s in sequences for position in getattr(s, name)]
            arrays[before] = [b * length + position - 1 for b, s in enumerate(sequences) for position in getattr(s, name)]
        images = arrays["image_at"] = [numbers[image.key] for s in sequences for image in s.images]
        if self.family.types:
            arrays[self.family.types] = ids == self.backbone_processor.config.image_token_id
        batch = {name: torch.as_tensor(np.asarray(value, np.int64)) for name, value in arrays.items()}
        if self.family.positions and images:
            batch["position_ids"] = self.family.positions(
                self.model, batch, torch.cat([image.grid for s in sequences for image in s.images])
            )
        return batch
