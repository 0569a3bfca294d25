"""The three phases of the two stages of TPAD (arXiv 2504.10538): what makes a step, and what is minimised, side by side.

    knowledge  K learns what items are: it writes their texts, and its views of an item agree  -> table of k(v)
    transfer   T learns what follows what: next-item retrieval, split into t(v) and c(v)       -> table of t(v)
    align      K gains a second head p(v) that takes over t(v): the unified MLLM               -> published

The paper's public text gives this structure; losses and prompts are this project's own choices. Only training
sessions are ever read. Every random choice is a function of (seed, phase, step): a run that was killed and resumed, or
spread over processes, is the same run. Every process computes the loss of the whole global batch from gathered
features. The loop that trains a phase is in `trainer.py`.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config import Config, PhaseConfig
from pipeline.data.session_log import SessionLog
from pipeline.distill.critic import Critic, club, club_bound, smile
from pipeline.distill.experimental.soft_targets import Teacher
from pipeline.distill.grad_cache import Chunk, split
from pipeline.distill.process_group import Group
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import Prompts, View
from pipeline.objectives.contrastive import info_nce, relation_loss, soft_loss

Tensors = dict[str, Tensor]
Critics = dict[str, Critic]
ORDER, PROBE, DROPOUT, DRAW = range(1, 5)  # what randomness is for: numbers in its key, so that no two uses share a stream


@lru_cache(maxsize=3)  # a step's epoch, the next one where a batch spans both, and the probe's
def shuffled(count: int, *key: int) -> np.ndarray:
    """(count,) the indices below `count` in an order of the key's own."""
    return np.random.default_rng(key).permutation(count)


def drawn(count: int, batch: int, step: int, *key: int) -> np.ndarray:
    """The indices below `count` of a step: shuffled epochs one after the other, cut into batches."""
    at = np.arange(step * batch, (step + 1) * batch)
    return np.array([shuffled(count, *key, ORDER, place // count)[place % count] for place in at.tolist()])


def first_of_each(rows: np.ndarray) -> Tensor:
    """(B,) bool: where an item stands first in a batch. One that spans two epochs may have it twice, and it is no negative of itself."""
    first = np.zeros(len(rows), bool)
    first[np.unique(rows, return_index=True)[1]] = True
    return torch.from_numpy(first)


@dataclass
class Phase:
    """What a phase works on. Each kind below says which sequences make a step, and what is to be minimised."""

    config: Config
    prompts: Prompts
    encoder: PromptProcessor
    train: SessionLog
    group: Group
    tables: Tensors  # what earlier phases found: "knowledge" k(v) and "transition" t(v), each (N, D)
    teacher: Teacher | None = None
    summaries: dict[str, str] = field(default_factory=dict)  # by `summary_key`, what K wrote of earlier items

    name: ClassVar[str]
    number: ClassVar[int]
    heads: ClassVar[dict[str, tuple[str, ...]]]  # by name of the sequences
    new: ClassVar[tuple[str, ...]]  # heads that no earlier phase has trained

    @property
    def from_knowledge(self) -> bool:
        """Whether it starts from K's weights, and its new heads from K's head; or from the backbone as it came."""
        return True

    @property
    def settings(self) -> PhaseConfig:
        settings: PhaseConfig = getattr(self.config.distill, self.name)
        return settings

    def rng(self, step: int, *more: int, use: int = DRAW) -> np.random.Generator:
        # numpy fills a short key up with zeros, so its length is part of it
        return np.random.default_rng([self.config.seed, self.number, use, len(more), step, *more])

    def drawn(self, count: int, step: int) -> np.ndarray:
        return drawn(count, self.settings.batch, step, self.config.seed, self.number)

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[list[Chunk], Tensors]:
        """This process's tensors of a step, in chunks, and facts about its whole global batch."""
        sequences, facts = self.work(step)
        return [self.encoder.collate(part) for part in split(sequences, self.config.distill.chunk)], facts

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        raise NotImplementedError

    def critics(self) -> Critics:
        """Those of this phase's losses, untrained."""
        return {}

    def losses(self, out: Tensors, facts: Tensors, critics: Critics) -> Tensors:
        raise NotImplementedError

    def unseen(self, facts: Tensors) -> np.ndarray:
        """Rows to probe the bounds on: always the first of one order that are not in this step's batch."""
        return np.empty(0, np.int64)

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        """The bounds on the (n, D) features, by head, of such rows."""
        return {}

    def _others(self, rows: np.ndarray, seen: Tensor) -> np.ndarray:
        order = rows[shuffled(len(rows), self.config.seed, self.number, PROBE)]
        others: np.ndarray = order[~np.isin(order, seen.cpu().numpy())][: self.config.distill.probe.items]
        return others


class Knowledge(Phase):
    """Stage 1. L_gen over the items' texts, and L_view between two views of an item."""

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


class Window(NamedTuple):
    """What of a session is shown, and asked for: its last item is only that."""

    rows: np.ndarray
    earlier: str  # a summary of the items before


def starts(rows: np.ndarray, items: int) -> range:
    """Where windows of `items` shown items and the next begin, so that each item but the first is asked for once."""
    return range(0, len(rows) - 1, items)


def summary_key(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()


class Transfer(Phase):
    """Stage 2, first half. Next-item retrieval and generation over training sessions; t(v) kept apart from c(v)."""

    name, number = "transfer", 1
    heads: ClassVar = {"sessions": ("session",), "items": ("transition", "content")}
    new = ("session", "transition", "content")

    @property
    def from_knowledge(self) -> bool:
        return self.config.distill.transfer.start == "knowledge"

    @cached_property
    def asked(self) -> np.ndarray:
        """(N,) how likely one session drawn, with its window drawn as `_window` does, asks for an item: for items that stand
        twice in a window, how often it does, at most 1."""
        cfg, lengths = self.config.distill.transfer, np.diff(self.train.offsets)
        length, place = np.repeat(lengths, lengths), np.arange(len(self.train.rows)) - np.repeat(self.train.offsets[:-1], lengths)
        if cfg.summary:
            windows = np.maximum(1, -(-(length - 1) // cfg.items))  # as many as `starts`, each item but the first in one
            asking = (place > 0) / windows
        else:
            windows = np.maximum(1, length - cfg.items)
            asking = (np.minimum(place, windows) - np.maximum(0, place - cfg.items)) / windows
        share: np.ndarray = np.minimum(1, np.bincount(self.train.rows, asking, len(self.prompts)) / len(self.train))
        return share

    def work(self, step: int) -> tuple[dict[str, list[Encoded]], Tensors]:
        cfg = self.config.distill.transfer
        windows = [self._window(int(s), self.rng(step, n)) for n, s in enumerate(self.drawn(len(self.train), step))]
        target = np.full((cfg.batch, cfg.items), -1)
        for b, window in enumerate(windows):
            target[b, : len(window.rows) - 1] = window.rows[1:]
        # every item stands once among the candidates, so no negative is false
        candidates, place = np.unique(target[target >= 0], return_inverse=True)
        target[target >= 0] = place
        even = np.resize(candidates, math.ceil(len(candidates) / self.group.world) * self.group.world)
        sequences = {
            "sessions": [self._session(windows[b], self.rng(step, b, 1)) for b in self.group.share(np.arange(cfg.batch))],
            "items": [self._item(int(row), self.rng(step, int(row), 2)) for row in self.group.share(even)],
        }
        came = 1 - (1 - self.asked[candidates]) ** cfg.batch  # probability to be a candidate of this batch
        facts = {
            "target": torch.from_numpy(target),
            "candidates": torch.from_numpy(candidates),
            "log_q": torch.from_numpy(np.log(came)).float(),
        }
        if cfg.intent:
            written = [len(self.encoder.answer(text)) for window in windows if (text := self.prompts.common(window.rows))]
            facts["intent_tokens"] = torch.tensor(sum(written))
        if self.teacher:  # short windows are filled up with what nobody asks about
            facts["shown"] = torch.from_numpy(np.array([np.resize(window.rows[:-1], cfg.items) for window in windows]))
        return sequences, facts

    def _view(self, row: int, rng: np.random.Generator) -> View:
        cfg = self.config.distill.transfer
        return self.prompts.dropped(row, cfg.withhold_text, cfg.withhold_image, rng)

    def _session(self, window: Window, rng: np.random.Generator) -> Encoded:
        intent = self.prompts.common(window.rows) if self.config.distill.transfer.intent else ""
        views = [self._view(int(row), rng) for row in window.rows[:-1]]
        return self.encoder.encode(self.prompts.session(window.rows, views, intent, window.earlier))

    def _item(self, row: int, rng: np.random.Generator) -> Encoded:
        return self.encoder.encode(self.prompts.item(row, self._view(row, rng)))

    def _window(self, session: int, rng: np.random.Generator) -> Window:
        cfg, rows = self.config.distill.transfer, self.train.session(session)
        if not cfg.summary:
            first = rng.integers(max(0, len(rows) - cfg.items - 1) + 1)
            return Window(rows[first : first + cfg.items + 1], "")
        first = rng.choice(starts(rows, cfg.items))
        earlier = rows[max(0, first - cfg.summary * cfg.items) : first]
        return Window(rows[first : first + cfg.items + 1], self.summaries[summary_key(earlier)] if first else "")

    def critics(self) -> Critics:
        return {"club": club(self.config.distill, self.group.accelerator.device)}

    def losses(self, out: Tensors, facts: Tensors, critics: Critics) -> Tensors:
        cfg = self.config.distill.transfer
        asked = facts["target"] >= 0  # (B, n)
        local = out["sessions.session"].new_zeros(len(asked) // self.group.world, cfg.items, self.config.distill.dim)
        local[asked.chunk(self.group.world)[self.group.rank]] = out["sessions.session"]
        session = self.group.gather(local)[asked]
        transition, content = (self.group.gather(out[f"items.{head}"])[: len(facts["candidates"])] for head in ("transition", "content"))
        known = self.tables["knowledge"][facts["candidates"]]
        losses = {
            "retrieval": cfg.retrieval * info_nce(session, transition, 1.0, facts["log_q"], facts["target"][asked]),
            "generation": cfg.generation * out["sessions.nll"],
            "tie": cfg.tie * info_nce(content, known, cfg.temperature),
            # only c(v) gives way: pulled at from both sides, t(v) would rather collapse
            "disentangle": cfg.disentangle * club_bound(critics["club"], transition.detach(), content),
        }
        if cfg.intent:
            written = self.group.total(out.get("sessions.intent_nll", session.new_zeros(())))
            losses["intent"] = cfg.intent * written / facts["intent_tokens"].clamp(min=1)
        if self.teacher:
            prefixes = [facts["shown"][b, : n + 1] for b, n in asked.nonzero().tolist()]
            losses["soft"] = cfg.soft * soft_loss(session @ transition.T, self.teacher(prefixes, facts["candidates"]))
        return losses

    def unseen(self, facts: Tensors) -> np.ndarray:
        return self._others(np.flatnonzero(self.asked), facts["candidates"])

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        return {"club_bound": critics["club"].measure(features["transition"], features["content"])}


class Align(Phase):
    """Stage 2, second half: transitional pattern alignment. K, still writing texts, takes over t(v) in a head of its own.

    With `token_distill` it also follows, on every token of an answer, the distribution that T writes it with: MDist of LLaVA-KD
    (arXiv 2410.16236), which has the visual tokens follow too; here they do not, for their logits would outgrow the model.
    """

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
        learned, first = critics.get("smile"), facts["first"]
        ours, theirs = pattern[first], transition[first]
        align = -learned.bound(ours, theirs) if learned else info_nce(ours, theirs, cfg.temperature)
        taught = {"token_distill": cfg.token_distill * out["items.divergence"]} if cfg.token_distill else {}
        return taught | {
            "align": cfg.align * align,
            "relation": cfg.relation * relation_loss(ours, theirs, cfg.temperature),
            "generation": cfg.generation * out["items.nll"],
            "keep": cfg.keep * (1 - (knowledge * known).sum(-1)).mean(),
            # only k(v) gives way, against `keep`: p(v) has t(v) to follow
            "disentangle": cfg.disentangle * club_bound(critics["club"], pattern.detach(), knowledge),
        }

    def unseen(self, facts: Tensors) -> np.ndarray:
        return self._others(np.arange(len(self.prompts)), facts["rows"])

    def probe(self, features: Tensors, rows: Tensor, critics: Critics) -> dict[str, float]:
        pattern, transition, learned = features["transition"], self.tables["transition"][rows], critics.get("smile")
        if learned:
            nats = learned.measure(pattern, transition)
        else:
            nats = math.log(len(rows)) - float(info_nce(pattern, transition, self.config.distill.align.temperature))
        return {"info_nce": nats, "club_bound": critics["club"].measure(pattern, features["knowledge"])}


PHASES: tuple[type[Phase], ...] = (Knowledge, Transfer, Align)
