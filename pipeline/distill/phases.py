"""Defines the three phases of the two stages of TPAD (arXiv 2504.10538) side by side: the sequences of a step, and its losses.

    knowledge  K learns what items are: generation of their texts, agreement between views of an item  -> table of k(v)
    transfer   T learns which items follow which: next-item retrieval, split into t(v) and c(v)        -> table of t(v)
    align      K gains a second head p(v) that takes over t(v): the unified MLLM                       -> published

The paper's public text gives this structure; losses and prompts are this project's own choices. Only training sessions are read. Every
random draw is a function of (seed, phase, step), so a run that was killed and resumed, or spread over processes, gives the same weights.
Every process computes the loss of the global batch from gathered features. The training loop is in `trainer.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config import Config, PhaseConfig
from pipeline.data.session_log import SessionLog
from pipeline.distill.critic import Critic, club, club_bound, smile
from pipeline.distill.experimental.hook import LossInputs, Option
from pipeline.distill.grad_cache import Chunk, split
from pipeline.distill.process_group import Group
from pipeline.distill.windows import Window, window_starts
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import Prompts, View
from pipeline.objectives.contrastive import info_nce, relation_loss

Tensors = dict[str, Tensor]
Critics = dict[str, Critic]
ORDER, PROBE, DROPOUT, DRAW = range(1, 5)  # uses of randomness; part of its key, so that no two uses share a stream


@lru_cache(maxsize=3)  # the epoch of a step, the next one where a batch spans both, and the order of the probe
def shuffled(count: int, *key: int) -> np.ndarray:
    """Shuffles the indices below `count`, as the key says: (count,)."""
    return np.random.default_rng(key).permutation(count)


def drawn(count: int, batch: int, step: int, *key: int) -> np.ndarray:
    """Draws the indices below `count` of a step: shuffled epochs, one after the other, cut into batches."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([shuffled(count, *key, ORDER, place // count)[place % count] for place in places])


def first_of_each(rows: np.ndarray) -> Tensor:
    """Marks the first occurrence of each item: (B,) bool. A batch across two epochs can have an item twice; it is no negative of itself."""
    first = np.zeros(len(rows), bool)
    first[np.unique(rows, return_index=True)[1]] = True
    return torch.from_numpy(first)


@dataclass
class Phase:
    """Holds the data of a phase. Each subclass defines the sequences of a step and the losses."""

    config: Config
    prompts: Prompts
    encoder: PromptProcessor
    train: SessionLog
    group: Group
    tables: Tensors  # of earlier phases: "knowledge" k(v) and "transition" t(v), each (N, D)
    options: Sequence[Option] = ()  # from related work, off by default

    name: ClassVar[str]
    number: ClassVar[int]
    heads: ClassVar[dict[str, tuple[str, ...]]]  # by name of the sequences
    new: ClassVar[tuple[str, ...]]  # heads that are new in this phase

    @property
    def from_knowledge(self) -> bool:
        """Tells whether the phase starts from K's weights, with K's head copied into new heads, or from the untrained backbone."""
        return True

    @property
    def settings(self) -> PhaseConfig:
        settings: PhaseConfig = getattr(self.config.distill, self.name)
        return settings

    def rng(self, step: int, *more: int, use: int = DRAW) -> np.random.Generator:
        # numpy pads a short key with zeros, so the length is part of the key
        return np.random.default_rng([self.config.seed, self.number, use, len(more), step, *more])

    def drawn(self, count: int, step: int) -> np.ndarray:
        return drawn(count, self.settings.batch, step, self.config.seed, self.number)

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[list[Chunk], Tensors]:
        """Collates this process's tensors of a step, in chunks, and facts about the global batch."""
        sequences, facts = self.work(step)
        return [self.encoder.collate(part) for part in split(sequences, self.config.distill.chunk)], facts

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        """Draws a step: this process's sequences, by name, and facts about the global batch."""
        raise NotImplementedError

    def critics(self) -> Critics:
        """Makes the untrained critics of this phase's losses."""
        return {}

    def losses(self, out: Tensors, facts: Tensors, critics: Critics) -> Tensors:
        """Computes the weighted losses of a step from the outputs of `Mllm`; token losses are means."""
        raise NotImplementedError

    def unseen(self, facts: Tensors) -> np.ndarray:
        """Selects rows to probe the bounds on: the first in a fixed order that are not in this step's batch."""
        return np.empty(0, np.int64)

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        """Measures the bounds on the (n, D) features, by head, of these rows."""
        return {}

    def _others(self, rows: np.ndarray, batch: Tensor) -> np.ndarray:
        order = rows[shuffled(len(rows), self.config.seed, self.number, PROBE)]
        others: np.ndarray = order[~np.isin(order, batch.cpu().numpy())][: self.config.distill.probe.items]
        return others


class Knowledge(Phase):
    """Stage 1: generation loss L_gen over the items' texts, and InfoNCE L_view between two views of an item."""

    name, number = "knowledge", 0
    heads: ClassVar = {"items": ("knowledge",)}
    new = ("knowledge",)

    @property
    def from_knowledge(self) -> bool:
        return False

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        rows = self.drawn(len(self.prompts), step)
        pairs = [self.prompts.pair(int(row), self.rng(step, n)) for n, row in enumerate(rows)]
        sequences = [
            self.encoder.encode(self.prompts.knowledge(int(rows[n]), pairs[n][side], self.rng(step, int(n), side)))
            for side in (0, 1)
            for n in self.group.share(np.arange(len(rows)))
        ]
        paired = torch.tensor([a != b for a, b in pairs])
        return {"items": sequences}, {"paired": paired & first_of_each(rows)}

    def losses(self, out: Tensors, facts: Tensors, critics: Critics) -> Tensors:
        cfg = self.config.distill.knowledge
        one, other = (self.group.gather(side)[facts["paired"]] for side in out["items.knowledge"].chunk(2))
        view = (info_nce(one, other, cfg.temperature) + info_nce(other, one, cfg.temperature)) / 2 if len(one) else one.sum()
        return {"generation": cfg.generation * out["items.nll"], "view": cfg.view * view}


class Transfer(Phase):
    """Stage 2, first half: next-item retrieval and generation over training sessions, with t(v) disentangled from c(v)."""

    name, number = "transfer", 1
    heads: ClassVar = {"sessions": ("session",), "items": ("transition", "content")}
    new = ("session", "transition", "content")

    @property
    def from_knowledge(self) -> bool:
        return self.config.distill.transfer.start == "knowledge"

    @cached_property
    def inclusion_probability(self) -> np.ndarray:
        """Computes the probability that an item is a target in the window of one drawn session: (N,).

        For an item that occurs twice in a window, the expected count, at most 1.
        """
        cfg, lengths = self.config.distill.transfer, np.diff(self.train.offsets)
        length, place = np.repeat(lengths, lengths), np.arange(len(self.train.rows)) - np.repeat(self.train.offsets[:-1], lengths)
        if cfg.summary:
            windows = np.maximum(1, -(-(length - 1) // cfg.items))  # as in `window_starts`; every item except the first is in one
            target_share = (place > 0) / windows
        else:
            windows = np.maximum(1, length - cfg.items)
            target_share = (np.minimum(place, windows) - np.maximum(0, place - cfg.items)) / windows
        probability: np.ndarray = np.minimum(1, np.bincount(self.train.rows, target_share, len(self.prompts)) / len(self.train))
        return probability

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        cfg = self.config.distill.transfer
        windows = [self._window(int(s), self.rng(step, n)) for n, s in enumerate(self.drawn(len(self.train), step))]
        target = np.full((cfg.batch, cfg.items), -1)
        for b, window in enumerate(windows):
            target[b, : len(window.rows) - 1] = window.rows[1:]
        # the candidates are distinct items, so no negative is false
        candidates, place = np.unique(target[target >= 0], return_inverse=True)
        target[target >= 0] = place
        padded = np.resize(candidates, math.ceil(len(candidates) / self.group.world) * self.group.world)
        sequences = {
            "sessions": [self._session(windows[b], self.rng(step, b, 1)) for b in self.group.share(np.arange(cfg.batch))],
            "items": [self._item(int(row), self.rng(step, int(row), 2)) for row in self.group.share(padded)],
        }
        probability = 1 - (1 - self.inclusion_probability[candidates]) ** cfg.batch  # of being a candidate in this batch
        facts = {
            "target": torch.from_numpy(target),
            "candidates": torch.from_numpy(candidates),
            "log_q": torch.from_numpy(np.log(probability)).float(),
        }
        for option in self.options:
            facts |= option.facts(windows)
        return sequences, facts

    def _view(self, row: int, rng: np.random.Generator) -> View:
        cfg = self.config.distill.transfer
        return self.prompts.dropped(row, cfg.withhold_text, cfg.withhold_image, rng)

    def _session(self, window: Window, rng: np.random.Generator) -> Encoded:
        views = [self._view(int(row), rng) for row in window.rows[:-1]]
        intent, history = (window.parts.get(name, "") for name in ("intent", "history"))
        return self.encoder.encode(self.prompts.session(window.rows, views, intent, history))

    def _item(self, row: int, rng: np.random.Generator) -> Encoded:
        return self.encoder.encode(self.prompts.item(row, self._view(row, rng)))

    def _window(self, session: int, rng: np.random.Generator) -> Window:
        cfg, rows = self.config.distill.transfer, self.train.session(session)
        last_start = max(0, len(rows) - cfg.items - 1)
        first = int(rng.choice(window_starts(rows, cfg.items)) if cfg.summary else rng.integers(last_start + 1))
        window = rows[first : first + cfg.items + 1]
        parts: dict[str, str] = {}
        for option in self.options:
            parts |= option.prompt_parts(rows, first, window)
        return Window(window, parts)

    def critics(self) -> Critics:
        return {"club": club(self.config.distill, self.group.accelerator.device)}

    def losses(self, out: Tensors, facts: Tensors, critics: Critics) -> Tensors:
        cfg = self.config.distill.transfer
        has_target = facts["target"] >= 0  # (B, n)
        local = out["sessions.session"].new_zeros(len(has_target) // self.group.world, cfg.items, self.config.distill.dim)
        local[has_target.chunk(self.group.world)[self.group.rank]] = out["sessions.session"]
        session = self.group.gather(local)[has_target]
        transition, content = (self.group.gather(out[f"items.{head}"])[: len(facts["candidates"])] for head in ("transition", "content"))
        known = self.tables["knowledge"][facts["candidates"]]
        losses = {
            "retrieval": cfg.retrieval * info_nce(session, transition, 1.0, facts["log_q"], facts["target"][has_target]),
            "generation": cfg.generation * out["sessions.nll"],
            "tie": cfg.tie * info_nce(content, known, cfg.temperature),
            # the gradient moves c(v) only: moved from both sides, t(v) would collapse
            "disentangle": cfg.disentangle * club_bound(critics["club"], transition.detach(), content),
        }
        for option in self.options:
            losses |= option.losses(LossInputs(out, facts, self.group, session @ transition.T, has_target))
        return losses

    def unseen(self, facts: Tensors) -> np.ndarray:
        return self._others(np.flatnonzero(self.inclusion_probability), facts["candidates"])

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        return {"club_bound": critics["club"].measure(features["transition"], features["content"])}


class Align(Phase):
    """Stage 2, second half: transitional pattern alignment. K takes over t(v) in a new head, and still generates texts."""

    name, number = "align", 2
    heads: ClassVar = {"items": ("knowledge", "transition")}
    new = ("transition",)

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        cfg, rows = self.config.distill.align, self.drawn(len(self.prompts), step)
        sequences = []
        for n in self.group.share(np.arange(len(rows))):
            row, rng = int(rows[n]), self.rng(step, int(n))
            view = self.prompts.dropped(row, cfg.withhold_text, cfg.withhold_image, rng)
            sequences.append(self.encoder.encode(self.prompts.knowledge(row, view, rng)))
        return {"items": sequences}, {"rows": torch.from_numpy(rows), "first": first_of_each(rows)}

    def critics(self) -> Critics:
        cfg, device = self.config.distill, self.group.accelerator.device
        return {"club": club(cfg, device)} | ({"smile": smile(cfg, device)} if cfg.align.bound == "smile" else {})

    def losses(self, out: Tensors, facts: Tensors, critics: Critics) -> Tensors:
        cfg = self.config.distill.align
        knowledge, pattern = self.group.gather(out["items.knowledge"]), self.group.gather(out["items.transition"])
        known, transition = self.tables["knowledge"][facts["rows"]], self.tables["transition"][facts["rows"]]
        smile_critic, first = critics.get("smile"), facts["first"]
        ours, theirs = pattern[first], transition[first]
        align = -smile_critic.bound(ours, theirs) if smile_critic else info_nce(ours, theirs, cfg.temperature)
        extra: Tensors = {}
        for option in self.options:
            extra |= option.losses(LossInputs(out, facts, self.group))
        return extra | {
            "align": cfg.align * align,
            "relation": cfg.relation * relation_loss(ours, theirs, cfg.temperature),
            "generation": cfg.generation * out["items.nll"],
            "keep": cfg.keep * (1 - (knowledge * known).sum(-1)).mean(),
            # the gradient moves k(v) only, against `keep`; p(v) follows t(v)
            "disentangle": cfg.disentangle * club_bound(critics["club"], pattern.detach(), knowledge),
        }

    def unseen(self, facts: Tensors) -> np.ndarray:
        return self._others(np.arange(len(self.prompts)), facts["rows"])

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        pattern, transition = features["transition"], self.tables["transition"][rows]
        if smile_critic := critics.get("smile"):
            nats = smile_critic.measure(pattern, transition)
        else:
            nats = math.log(len(rows)) - float(info_nce(pattern, transition, self.config.distill.align.temperature))
        return {"info_nce": nats, "club_bound": critics["club"].measure(pattern, features["knowledge"])}


PHASES: tuple[type[Phase], ...] = (Knowledge, Transfer, Align)
