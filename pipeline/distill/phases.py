"""Defines the three phases of the two stages of TPAD (arXiv 2504.10538) side by side: the sequences of a step, and its losses.

    knowledge  K learns what items are: generation of their texts, agreement between views of an item  -> table of k(v)
    transfer   T learns which items follow which: next-item retrieval, split into t(v) and c(v)        -> table of t(v)
    align      K gains a second head p(v) that takes over t(v): the unified MLLM                       -> published

The paper's public text gives this structure; losses and prompts are this project's own choices. Only training sessions are read. Every
random draw is a function of (seed, phase, step), so a run that was killed and resumed, or spread over processes, gives the same weights;
but each process draws the dropout of its share.
Every process computes the loss of the global batch from gathered features. The training loop is in `trainer.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import Config
from pipeline.core.distill_config import PhaseConfig
from pipeline.data.session_log import SessionLog
from pipeline.distill.blocks import Blocks, transition_loss
from pipeline.distill.closed_form import chosen_closed_form, linear_fit
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
LEAST_VARIANCE = 1e-6  # of layer-normed states from item to item; below, it is rounding
HEAD_ROWS = 2**16  # items whose states start the heads of transitions, at most
ORDER, PROBE, DROPOUT, DRAW, FILL = range(1, 6)  # uses of randomness; part of its key, so that no two uses share a stream


@lru_cache(maxsize=6)  # by use: the epoch of a step and the next one, where a batch spans both
def shuffled(count: int, *key: int) -> np.ndarray:
    """Shuffles the indices below `count`, as the key says: (count,)."""
    return np.random.default_rng(key).permutation(count)


def drawn(count: int, batch: int, step: int, *key: int) -> np.ndarray:
    """Draws the indices below `count` of a step: shuffled epochs, one after the other, cut into batches."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([shuffled(count, *key, ORDER, place // count)[place % count] for place in places], np.int64)


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
    processor: PromptProcessor
    train: SessionLog
    group: Group
    tables: Tensors  # of earlier phases: "knowledge" k(v) and "transition" t(v), each (N, D)
    options: Sequence[Option] = ()  # from related work, off by default
    frozen: bool = False  # the backbone does not train: all phases read the same states

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

    def drawn(self, count: int, batch: int, step: int, *use: int) -> np.ndarray:
        return drawn(count, batch, step, self.config.seed, self.number, *use)

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[list[Chunk], Tensors]:
        """Collates this process's tensors of a step, in chunks, and facts about the global batch."""
        sequences, facts = self.work(step)
        return [self.processor.collate(part) for part in split(sequences, self.config.distill.chunk)], facts

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        """Draws a step: this process's sequences, by name, and facts about the global batch."""
        raise NotImplementedError

    def critics(self) -> Critics:
        """Makes the untrained critics of this phase's losses."""
        return {}

    def head_rows(self) -> np.ndarray:
        """Selects the items whose states start some heads in closed form."""
        return np.empty(0, np.int64)

    def head_maps(self, rows: np.ndarray, states: Tensor) -> Tensors:
        """Computes from the layer-normed states (n, d) of `head_rows` the affine maps (D, d + 1) that heads start with, by head."""
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
        rows = self.drawn(len(self.prompts), self.settings.batch, step)
        pairs = [self.prompts.pair(int(row), self.rng(step, n)) for n, row in enumerate(rows)]
        sequences = [
            self.processor.encode(self.prompts.knowledge(int(rows[n]), pairs[n][side], self.rng(step, int(n), side)))
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
    """Stage 2, first half: which items follow which, learned from blocks of items and from session prompts; t(v) disentangled from c(v)."""

    name, number = "transfer", 1
    heads: ClassVar = {"sessions": ("session",), "items": ("query", "transition", "content")}
    new = ("session", "query", "transition", "content")

    @property
    def from_knowledge(self) -> bool:
        return self.config.distill.transfer.start == "knowledge"

    @cached_property
    def blocks(self) -> Blocks:
        cfg = self.config.distill.transfer
        return Blocks(self.train, len(self.prompts), cfg.batch, cfg.window, cfg.popularity)

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        cfg, known = self.config.distill.transfer, self.blocks.known
        sessions = self.drawn(len(self.train), max(cfg.sessions, self.blocks.sessions), step)
        windows = [self._window(int(session), self.rng(step, n)) for n, session in enumerate(sessions[: cfg.sessions])]
        fill = known[self.drawn(len(known), min(self.blocks.half, len(known)), step, FILL)]
        targets = [window.rows[1:] for window in windows]
        block = np.unique(np.concatenate([self.blocks.rows(sessions[: self.blocks.sessions], self.rng(step)), fill, *targets]))
        padded = np.resize(block, math.ceil(len(block) / self.group.world) * self.group.world)
        sequences = {"items": [self._item(int(row), self.rng(step, int(row), 2)) for row in self.group.share(padded)]}
        facts = self.blocks.facts(block)
        if windows:
            sequences["sessions"] = [self._session(windows[b], self.rng(step, b, 1)) for b in self.group.share(np.arange(cfg.sessions))]
            target = np.full((cfg.sessions, cfg.items), -1)
            for b, window in enumerate(windows):
                target[b, : len(window.rows) - 1] = np.searchsorted(block, window.rows[1:])
            facts["target"] = torch.from_numpy(target)
        for option in self.options:
            facts |= option.facts(windows)
        return sequences, facts

    def head_rows(self) -> np.ndarray:
        return np.sort(np.argsort(-self.blocks.pairs, kind="stable")[: min(HEAD_ROWS, len(self.blocks.known))])

    def head_maps(self, rows: np.ndarray, states: Tensor) -> Tensors:
        if states.var(0).mean() < LEAST_VARIANCE:  # items that look alike have no directions
            return {}
        places = np.full(len(self.prompts), -1)
        places[rows] = np.arange(len(rows))
        maps, rank = chosen_closed_form(states.cpu(), self.train.moved(places, training=True), self.config.distill.dim, self.config.seed)
        if not self.settings.steps:  # training needs every direction to learn in, the closed form alone the best ones
            maps = maps.cut(rank)
        return {"query": maps.query, "session": maps.query, "transition": maps.item}

    def _view(self, row: int, rng: np.random.Generator) -> View:
        cfg = self.config.distill.transfer
        return self.prompts.dropped(row, cfg.withhold_text, cfg.withhold_image, rng)

    def _session(self, window: Window, rng: np.random.Generator) -> Encoded:
        views = [self._view(int(row), rng) for row in window.rows[:-1]]
        intent, history = (window.parts.get(name, "") for name in ("intent", "history"))
        return self.processor.encode(self.prompts.session(window.rows, views, intent, history))

    def _item(self, row: int, rng: np.random.Generator) -> Encoded:
        return self.processor.encode(self.prompts.item(row, self._view(row, rng)))

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
        heads = (self.group.gather(out[f"items.{head}"])[: len(facts["block"])] for head in ("query", "transition", "content"))
        query, transition, content = heads
        losses = {
            "retrieval": cfg.retrieval * transition_loss(query, transition, facts["pairs"], facts["bias"]),
            "tie": cfg.tie * info_nce(content, self.tables["knowledge"][facts["block"]], cfg.temperature),
            # the gradient moves c(v) only: moved from both sides, t(v) would collapse
            "disentangle": cfg.disentangle * club_bound(critics["club"], transition.detach(), content),
        }
        if "target" in facts:
            losses |= self._session_losses(out, facts, transition)
        return losses

    def _session_losses(self, out: Tensors, facts: Tensors, transition: Tensor) -> Tensors:
        """Computes the losses of the session prompts, whose candidates are the items of the block."""
        cfg = self.config.distill.transfer
        has_target = facts["target"] >= 0  # (B, n)
        local = out["sessions.session"].new_zeros(len(has_target) // self.group.world, cfg.items, self.config.distill.dim)
        local[has_target.chunk(self.group.world)[self.group.rank]] = out["sessions.session"]
        scores = self.group.gather(local)[has_target] @ transition.T
        losses = {
            "sessions": cfg.session * F.cross_entropy(scores + facts["bias"][0], facts["target"][has_target]),
            "generation": cfg.generation * out["sessions.nll"],
        }
        for option in self.options:
            losses |= option.losses(LossInputs(out, facts, self.group, scores, has_target))
        return losses

    def unseen(self, facts: Tensors) -> np.ndarray:
        return self._others(self.blocks.known, facts["block"])

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        return {"club_bound": critics["club"].measure(features["transition"], features["content"])}


class Align(Phase):
    """Stage 2, second half: transitional pattern alignment. K takes over t(v) in a new head, and still generates texts."""

    name, number = "align", 2
    heads: ClassVar = {"items": ("knowledge", "transition")}
    new = ("transition",)

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        cfg, rows = self.config.distill.align, self.drawn(len(self.prompts), self.settings.batch, step)
        sequences = []
        for n in self.group.share(np.arange(len(rows))):
            row, rng = int(rows[n]), self.rng(step, int(n))
            view = self.prompts.dropped(row, cfg.withhold_text, cfg.withhold_image, rng)
            sequences.append(self.processor.encode(self.prompts.knowledge(row, view, rng)))
        return {"items": sequences}, {"rows": torch.from_numpy(rows), "first": first_of_each(rows)}

    def head_rows(self) -> np.ndarray:
        if self.frozen:  # p begins as T's head
            return np.empty(0, np.int64)
        return np.linspace(0, len(self.prompts) - 1, min(HEAD_ROWS, len(self.prompts))).astype(np.int64)

    def head_maps(self, rows: np.ndarray, states: Tensor) -> Tensors:
        return {"transition": linear_fit(states, self.tables["transition"][rows])}

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
