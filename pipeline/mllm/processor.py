"""Prompt parts -> token ids and image tensors: what the MLLM is fed."""

import hashlib
import math
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from pipeline.core.config import BackboneConfig
from pipeline.core.errors import USAGE, UserError
from pipeline.data.catalog import Catalog
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.image_tokens import FAMILIES, Processor
from pipeline.mllm.prompts import Part
from pipeline.mllm.vision_cache import Cache
from pipeline.mllm.vision_tower import Picture, join

IMAGE_CACHE_BYTES = 1 << 30  # of encoded images kept, so that an epoch after the first decodes nothing


@dataclass
class Encoded:
    """One sequence: token ids, the pictures in it, where features are read, and which tokens are answers."""

    ids: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    reads: list[range] = field(default_factory=list)  # by feature, the positions it is the mean over
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
        self._words: dict[str, list[int]] = {}
        self._texts: dict[str, array[int]] = {}
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
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)

    def words(self, text: str) -> list[int]:
        """Of the words of a template, of which there are few."""
        if text not in self._words:
            self._words[text] = self.tokens(" " + text)
        return self._words[text]

    def text(self, text: str) -> "array[int]":
        """Of an item's text, cut to `max_text_tokens`; compact, as there may be a million of them."""
        found = self._texts.get(text)
        if found is None:
            found = array("i", self.tokens(" " + text)[: self.config.max_text_tokens])
            if len(self._texts) >= self._most_texts:
                self._texts.clear()
            self._texts[text] = found
        return found

    def encode(self, parts: Iterable[Part]) -> Encoded:
        """The sequence of `parts`; an answer ends with the end-of-sequence token."""
        out = Encoded(list(self.head))
        for part in parts:
            if part.kind == "words":
                out.ids += self.words(part.text)
            elif part.kind == "text":
                out.ids += self.text(part.text)
            elif part.kind == "image":
                picture = self.picture(part.row)
                out.ids += picture.ids
                out.pictures.append(picture)
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
        """Of the feature that is read at the end of `out`, the first token it is read at."""
        if self.config.pooling == "last":
            return len(out.ids) - 1
        return out.reads[-1].stop if out.reads else len(self.head)

    def decode(self, ids: Tensor) -> list[str]:
        """(B, n) written tokens -> texts, in one line each."""
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def greedy(self, most: int) -> GenerationConfig:
        """To write at most so many tokens, always the likeliest, and none that stands for something else than text."""
        end = self.tokenizer.eos_token_id
        other = sorted({*self.tokenizer.all_special_ids, self.processor.config.image_token_id} - {end})
        return GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=self.pad, eos_token_id=end, suppress_tokens=other)

    def answer(self, text: str) -> list[int]:
        return [*self.text(text), self.tokenizer.eos_token_id]

    def length(self, parts: Iterable[Part]) -> int:
        """How long `encode` will make the sequence of an item's parts, known without decoding its image."""
        count = len(self.head)
        for part in parts:
            if part.kind == "words":
                count += len(self.words(part.text))
            elif part.kind == "text":
                count += len(self.text(part.text))
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

        A batch: `input_ids`, `attention_mask` (B, L); `read_at` (M,) and `answer_at` (A,), flat positions in (B * L) of the
        tokens features are read at and of those before each answer token; `read_over` (R,), how many tokens each feature is the mean
        over; `answers` (A,); `intent_at` and `intents` likewise;
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
        reads: list[int] = []
        over: list[int] = []
        before, answers, before_intents, intents = [], [], [], []
        for b, s in enumerate(sequences):
            ids[b, : len(s)], mask[b, : len(s)] = s.ids, 1
            reads += [b * length + at for read in s.reads for at in read]
            over += map(len, s.reads)
            before += [b * length + at - 1 for at in s.answers]
            answers += [s.ids[at] for at in s.answers]
            before_intents += [b * length + at - 1 for at in s.intents]
            intents += [s.ids[at] for at in s.intents]
        pictures = [place[p.key] for s in sequences for p in s.pictures]
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "read_at": reads,
            "read_over": over,
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
