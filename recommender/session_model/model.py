"""The session model: graph and attention over a session, then a mixture over what each of its items leads to.

Every item has up to two vectors: one projected from its exported, whitened embedding (content) and one learned for its
id. Each kind is a channel with a session graph, attention and queries of its own; the channels meet only in the score

    score(j) = log sum_c exp(score of component c for j)

over the components: content channel at each position of the prefix, id channel at each position, what followed that
position's item in training, what stood near it (counts, each session held against the other ones), popularity, and an item
of the prefix again. The last replaces a share of what the others give such an item, by how long ago it was seen: by its
content nothing goes better with an item than itself, and whether visitors come back to it is another question.

A sum of vectors or of logits lets a weak channel spoil a strong one for every item; in this mixture a component that
knows nothing about the case has a low weight and does no harm. It is also what a shop does: the next item goes with one
of the items seen, for one reason.

An item without training events has no id vector: the id channel neither reads nor offers it. ID dropout shows the
model such items during training, strangers below. How often an item comes is what was counted and, beside it, a share of what its
content lets expect. Position t reads only events up to t, so one pass answers every prefix of a session.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.session_model.channel import Channel
from recommender.session_model.config import LEAST_MASS, NEVER, SEEN_RATE, ModelConfig, Parts
from recommender.session_model.losses import log_partition
from recommender.session_model.negative_sampling import Candidates
from recommender.session_model.ops import causal, find, packed, padded, steps_back
from recommender.session_model.pair_counts import Pairs
from recommender.session_model.popularity_prior import expected_log_counts
from recommender.session_model.windows import PAD

LOG2E = float(np.log2(np.e))  # exp2 takes half the time of exp, and of a small number no more than of another


class Tables(NamedTuple):
    """What the session is held against: per channel the item vectors and log-weights, and who is known by id."""

    vectors: dict[str, Tensor]  # (N, D) each, or (M, D) of `items`; of the content (N, D + 1), the last number 1 for a stranger
    priors: dict[str, Tensor]  # (N,) each; also "popular"
    known: Tensor  # (N,) bool
    items: Tensor | None = None  # (M,) ascending, that a training step touches; None: all

    def of(self, channel: str, rows: Tensor) -> Tensor:
        """The vectors of `rows`, of any shape; of one that is not among `items`, another's."""
        if self.items is not None:
            rows = torch.searchsorted(self.items, rows).clamp(max=len(self.items) - 1)
        return self.vectors[channel][rows]


class Reading(NamedTuple):
    """What the session says at each position t: queries, and log-weights of the components at (t, s <= t)."""

    queries: dict[str, Tensor]  # (B, L, D), the channel's scale in them; of the content (B, L, D + 1)
    weights: dict[str, Tensor]  # (B, L, L); also "copy"
    seen: Tensor  # (B, L, L) logit of the share that an item loses, at (t, where it was seen last); elsewhere NEVER
    popular: Tensor  # () log-weight


class Mixture(NamedTuple):
    """What ranking needs of B windows in each of which C positions are asked for."""

    rows: Tensor  # (B, L)
    queries: dict[str, Tensor]  # (B, L, D), for exp2
    weights: dict[str, Tensor]  # (B, C, L) of the components at each position; also "copy", and the tables of pairs
    lost: Tensor  # (B, C, L) the share of what the others give it that the item of an event loses, where it was seen last
    popular: Tensor  # () weight

    def of(self, part: slice) -> "Mixture":
        """That of some of the windows."""
        queries, weights = ({name: of[part] for name, of in each.items()} for each in (self.queries, self.weights))
        return Mixture(self.rows[part], queries, weights, self.lost[part], self.popular)


class SessionModel(nn.Module):
    """Full, ID-only (content_dim 0) or content-only (ids False) from one class.

    `content` (N, content_dim) is whitened already; `rows` and `offsets` are the training sessions.
    """

    content: Tensor
    known: Tensor
    counts: Tensor
    expects: Tensor
    expected: Tensor

    def __init__(self, config: ModelConfig, content: np.ndarray | None, rows: np.ndarray, offsets: np.ndarray) -> None:
        super().__init__()
        self.config = config
        counts = np.bincount(rows, minlength=config.items)
        known = torch.as_tensor(counts > 0)
        self.register_buffer("known", known)
        events = torch.as_tensor(counts, dtype=torch.float32)
        self.register_buffer("counts", events / events[known].log().mean().exp())  # over their geometric mean
        self.channels = nn.ModuleDict()
        self.pairs = nn.ModuleDict()
        if config.content_dim:
            self.register_buffer("content", torch.as_tensor(content, dtype=torch.float32))
            self.project = nn.Linear(config.content_dim, config.dim, bias=False)
            self.channels["content"] = Channel(config.dim, config.max_prefix, config.parts)
            # log-weight of a stranger beside how often it is expected: to the content of a known item, to that of a stranger, and to all
            self.stranger = nn.Parameter(torch.zeros(3))
            expects, expected = expected_log_counts(self.content.numpy(), self.counts.numpy())
            self.register_buffer("expects", torch.as_tensor(expects))
            self.register_buffer("expected", torch.as_tensor(expected))
        if config.ids:
            self.ids = nn.Embedding(config.items, config.dim)
            nn.init.normal_(self.ids.weight, std=0.1)
            self.channels["id"] = Channel(config.dim, config.max_prefix, config.parts)
            for name, steps in pair_steps(config.parts).items():
                self.pairs[name] = Pairs(rows, offsets, config.items, config.max_prefix, steps)
        self.copy = nn.Parameter(torch.full((config.max_prefix,), -4.0)) if config.parts.repeat else None
        self.seen = nn.Parameter(torch.zeros(config.max_prefix)) if config.parts.repeat else None
        self.belief = nn.Parameter(torch.tensor(-2.0))  # log of the share of an item's expected events that stands beside those it had
        self.popular = nn.Parameter(torch.tensor(-1.0))
        self.popularity = nn.Parameter(torch.tensor(0.5)) if config.parts.popularity else 0.0

    @classmethod
    def restored(cls, config: ModelConfig, tensors: dict[str, Tensor]) -> "SessionModel":
        """The model whose `state_dict()` is `tensors`."""
        content = np.zeros((config.items, config.content_dim), np.float32) if config.content_dim else None
        model = cls(config, content, np.zeros(1, np.int64), np.array([0, 1]))
        for name, pairs in model.counted():
            pairs.resize(len(tensors[f"pairs.{name}.keys"]))
        model.load_state_dict(tensors)
        return model

    def over(self, rows: Tensor, content: Tensor | None) -> "SessionModel":
        """The same model over another catalogue: `rows` (N,) says which item here each of its items is, -1 for a new one,
        which is then known by its `content` (N, content_dim) alone, as one without training events is."""
        tensors, count, old = dict(self.state_dict()), len(rows), rows.clamp(min=0)
        tensors |= {"known": self.known[old] & (rows >= 0), "counts": self.counts[old]}
        if content is not None:
            expected = torch.where(tensors["known"], self.expected[old], content @ self.expects)
            tensors |= {"content": content, "expected": expected}
        if self.config.ids:
            place = torch.full((self.config.items,), -1)
            place[rows[rows >= 0]] = (rows >= 0).nonzero()[:, 0]
            tensors["ids.weight"] = self.ids.weight[old]
            for name, pairs in self.counted():
                tensors |= {f"pairs.{name}.{key}": value for key, value in pairs.over(place, count).items()}
        return SessionModel.restored(replace(self.config, items=count), tensors)

    def learning(self, rows: np.ndarray, offsets: np.ndarray, counts: np.ndarray, seed: int) -> "SessionModel":
        """The same model with the sessions `rows`, `offsets` counted too, so that `counts` (N,) are all events of each item, ready to be
        trained on. What calibration has set, the weights of repeats and of cold items, stays."""
        tensors = dict(self.state_dict())
        known = torch.as_tensor(counts > 0)
        events = torch.as_tensor(counts, dtype=torch.float32)
        tensors |= {"known": known, "counts": events / events[known].log().mean().exp()}
        if self.config.content_dim:
            expects, expected = expected_log_counts(self.content.numpy(), tensors["counts"].numpy())
            tensors |= {"expects": torch.as_tensor(expects), "expected": torch.as_tensor(expected)}
        if self.config.ids:
            new = known & ~self.known  # which have no vector of their own yet
            drawn = 0.1 * torch.randn(self.ids.weight.shape, generator=torch.Generator().manual_seed(seed))
            tensors["ids.weight"] = torch.where(new[:, None], drawn, self.ids.weight)
            for name, pairs in self.counted():
                tensors |= {f"pairs.{name}.{key}": value for key, value in pairs.plus(rows, offsets).items()}
        model = SessionModel.restored(self.config, tensors)
        for calibrated in (model.copy, model.stranger if self.config.content_dim else None):
            if calibrated is not None:
                calibrated.requires_grad_(False)
        return model

    def tables(self, known: Tensor | None = None, items: Tensor | None = None) -> Tables:
        """The item tables. `known` (N,) says whose id may be used (training: a random part); vectors are made for all items or for
        `items` (M,) alone."""
        some = slice(None) if items is None else items
        known = self.known if known is None else known
        log_count = self.log_counts(known)
        level = -float(np.log(max(int(self.known.sum()), 1)))  # a channel starts near a distribution, level with the others
        vectors, priors = {}, {}
        if "content" in self.channels:
            vectors["content"] = torch.cat([F.normalize(self.project(self.content[some]), dim=-1), ~known[some, None]], -1)
            priors["content"] = self.channel("content").popularity * log_count + level
            priors["popular"] = self.popularity * log_count + self.stranger[2] * ~known
        else:
            priors["popular"] = (self.popularity * log_count).masked_fill(~known, NEVER)
        if "id" in self.channels:
            ids = self.ids.weight if items is None else self.ids(items)
            vectors["id"] = F.normalize(ids, dim=-1) * known[some, None]
            priors["id"] = (self.channel("id").popularity * log_count + level).masked_fill(~known, NEVER)
        priors["popular"] = priors["popular"] - priors["popular"][self.known].logsumexp(0)
        return Tables(vectors, priors, known, items)

    def log_counts(self, known: Tensor) -> Tensor:
        """(N,) log of how often each item comes: its events in training, and beside them a share of those its content lets expect. That is
        all there is of a stranger; where training shows none, one is as likely as its content lets expect."""
        expected = self.expected if "content" in self.channels else torch.zeros_like(self.counts)
        share = self.belief + expected
        return torch.where(known, (self.counts + share.exp()).log(), share if self.config.hides_ids else expected)

    def forward(
        self, rows: Tensor, targets: Tensor, known: Tensor, candidates: Candidates, generator: torch.Generator, times: Tensor | None = None
    ) -> Tensor:
        """The training losses of (B, L) windows, (cases,), whose targets are among the candidates. `times` (B, L) as in `Windows`."""
        touched = None
        if len(candidates.items) < self.config.items / 2:
            touched = torch.cat([candidates.items, rows[rows != PAD]]).unique()  # type: ignore[no-untyped-call]
        return self.losses(rows, targets, self.tables(known, touched), candidates, times)

    def channel(self, name: str) -> Channel:
        found = self.channels[name]
        assert isinstance(found, Channel)
        return found

    def counted(self) -> Iterator[tuple[str, Pairs]]:
        """The tables of pairs, by name."""
        for name, pairs in self.pairs.items():
            assert isinstance(pairs, Pairs)
            yield name, pairs

    def draw_known(self, generator: torch.Generator) -> Tensor:
        """Whose id is shown in a training step: ID dropout of whole items, from a generator on the CPU; (N,) bool."""
        if not self.config.hides_ids:
            return self.known
        return self.known & (torch.rand(self.config.items, generator=generator) >= self.config.id_dropout).to(self.known.device)

    def read(self, rows: Tensor, tables: Tables) -> Reading:
        """rows (B, L), padded on the right"""
        real = rows != PAD
        item = rows.clamp(min=0)
        queries, weights = {}, {}
        for name, channel in self.channels.items():
            states = tables.of(name, item)[..., : self.config.dim] * real[..., None]
            queries[name], weights[name] = channel(states, rows, real)
        if "content" in queries:
            to_stranger = torch.where(tables.known[item], self.stranger[0], self.stranger[1])
            queries["content"] = torch.cat([queries["content"], to_stranger[..., None]], -1)
        if "id" in weights:
            weights["id"] = weights["id"].masked_fill(~tables.known[item][:, None, :], NEVER)
        back = steps_back(rows.shape[1], rows.device)
        open_ = causal(rows.shape[1], rows.device) & real[:, None, :]
        copy = torch.full_like(back, NEVER, dtype=self.popular.dtype) if self.copy is None else self.copy[back]
        weights["copy"] = copy.masked_fill(~open_, NEVER)
        seen = torch.full_like(copy, NEVER) if self.seen is None else SEEN_RATE * self.seen[back]
        return Reading(queries, weights, seen.masked_fill(~(open_ & seen_last(rows)), NEVER), self.popular)

    def losses(self, rows: Tensor, targets: Tensor, tables: Tables, candidates: Candidates, times: Tensor | None = None) -> Tensor:
        """-log P(target | prefix) of every case of (B, L) windows, (cases,), plus `own_loss` times that of each channel on its own,
        without which a channel learns only what the counts leave unexplained, which is mostly noise. What the channels give
        all items is summed over the `candidates`."""
        reading = self.read(rows, tables)
        real, case = rows != PAD, targets != PAD
        item, target = rows.clamp(min=0), targets.clamp(min=0)
        known = tables.known[item][:, None, :]
        over, under = [], []  # log of the target's part, log of everybody's part, (B, t, s)
        left_out: list[Tensor] = []  # what everybody's part lacks of the target's, (B, t, s)
        shares = []  # of everybody's part, the items of the window: (B, s, u)
        own = torch.zeros((), device=rows.device)
        items, correction = candidates.items, candidates.correction
        hidden = candidates.hidden(None if times is None else times[real], targets[real])  # (E, C) of the real positions
        missed = candidates.missed(times, targets)  # (B, t, s) though a target counts, whichever position's sum it is held against
        for name, query in reading.queries.items():
            prior = tables.priors[name]
            sums = log_partition(packed(query, real), tables.of(name, items), prior[items] + correction, hidden)
            total = padded(sums[:, None], real)[..., 0]
            of_target = tables.of(name, target) @ query.transpose(1, 2) + prior[target][..., None]
            over.append(reading.weights[name] + of_target)
            under.append(reading.weights[name] + total[:, None, :])
            everybody = [under[-1]]
            if missed is not None:
                left_out.append(over[-1].masked_fill(~missed, NEVER))
                everybody.append(left_out[-1])
            shares.append((query @ tables.of(name, item).transpose(1, 2) + prior[item][:, None, :] - total[..., None]).clamp(max=0).exp())
            own = own + torch.cat(everybody, -1)[case].logsumexp(-1) - over[-1][case].logsumexp(-1)
        for _, pairs in self.counted():
            share, weights = pairs(rows, targets)
            of_target = share[..., 1:].transpose(1, 2) * tables.known[target][..., None]
            over.append((weights + of_target.clamp(min=1e-30).log()).masked_fill(~known | (of_target == 0), NEVER))
            under.append(weights.masked_fill(~known, NEVER))
            shares.append(share[..., :-1] * known)
        popular = tables.priors["popular"] + reading.popular
        over.append(popular[target][..., None])
        of_popular = reading.popular.expand(*rows.shape, 1)
        if hidden is not None:  # the share of the popularity prior that is left to the candidates that are available
            mass = (tables.priors["popular"][items] + correction).exp()
            of_popular = of_popular + padded((1 - hidden.float() @ mass / mass.sum()).clamp(min=1e-6).log()[:, None], real)
        logs = torch.cat([*under, of_popular, reading.weights["copy"]], -1)[case]
        whole = torch.cat([logs, *(part[case] for part in left_out)], -1).logsumexp(-1, keepdim=True)  # (cases, 1)
        # what each item of the window, u, is given, as a share of the whole, and what is left when those seen have lost theirs
        share = torch.cat(shares, 1)
        given = padded(((logs[:, : share.shape[1]] - whole) * LOG2E).exp2(), case) @ share
        again = targets[..., None] == rows[:, None, :]  # (B, t, u)
        of_seen = given[case] + (popular[item][:, None, :].expand_as(again)[case] - whole).exp()
        seen = reading.seen[case]
        left = whole[:, 0] + (1 - (of_seen * seen.sigmoid()).sum(-1)).clamp(min=1e-6).log()
        kept = (F.logsigmoid(-seen) * again[case]).sum(-1, keepdim=True)
        copied = reading.weights["copy"].masked_fill(~again, NEVER)[case]
        part = torch.cat([torch.cat(over, -1)[case] + kept, copied], -1).logsumexp(-1)
        return left - part + self.config.own_loss * own

    def scores(self, rows: Tensor, tables: Tables, cases: Tensor | None = None, items: Tensor | None = None) -> Tensor:
        """Scores (cases, N) for the positions where `cases` (B, L) holds; None: the last one of each prefix, none of them
        empty. `items` (C,), ascending, gives (cases, C) instead."""
        if cases is None:
            cases = torch.arange(rows.shape[1], device=rows.device) == (rows != PAD).sum(1, keepdim=True) - 1
        count = cases.sum(1)
        if bool((count == count[:1]).all()):
            return self.masses(self.mixture(rows, tables, cases), tables, items).clamp_(min=LEAST_MASS).log_()
        every = self.mixture(rows, tables, torch.ones_like(cases))
        return self.masses(every, tables, items)[cases.flatten()].clamp_(min=LEAST_MASS).log_()

    def mixture(self, rows: Tensor, tables: Tables, cases: Tensor) -> Mixture:
        """Of (B, L) windows, in each of which `cases` (B, L) holds as often."""
        reading = self.read(rows, tables)
        weights = reading.weights | {name: pairs.weights(rows) for name, pairs in self.counted()}
        asked = {name: each[cases].exp().view(len(rows), -1, rows.shape[1]) for name, each in weights.items()}
        lost = reading.seen[cases].sigmoid().view(len(rows), -1, rows.shape[1])
        return Mixture(rows, {name: query * LOG2E for name, query in reading.queries.items()}, asked, lost, reading.popular.exp())

    def masses(self, mixture: Mixture, tables: Tables, items: Tensor | None = None) -> Tensor:
        """exp of the scores, which rank the same: (B * C, N), or `items` as above."""
        rows, queries, weights, lost, popular = mixture
        some = slice(None) if items is None else items
        total = tables.priors["popular"][some].exp() * popular  # (N,), from here on (B, C, N)
        for name, query in queries.items():
            part = (query.flatten(0, 1) @ tables.vectors[name][some].T).exp2_().view(*rows.shape, -1)
            total = torch.addcmul(total, torch.bmm(weights[name], part), tables.priors[name][some].exp())
        # counts of pairs and copies are sparse: per case a few items at a time, added where they belong
        place, there = rows.clamp(min=0), rows != PAD
        if items is not None:
            place, there = find(items, place, there)
        for name, pairs in self.counted():
            pairs.add(total, rows, weights[name], items)
        event = place[:, None].expand_as(lost)
        total.scatter_reduce_(2, event, 1 - lost * there[:, None], "prod")
        total.scatter_add_(2, event, weights["copy"] * there[:, None])
        return total.flatten(0, 1)


def pair_steps(parts: Parts) -> dict[str, list[int]]:
    """How far apart the items of each table of pairs stand."""
    steps = {"followers": [1]} if parts.followers else {}
    near = [step for step in range(-parts.companions, parts.companions + 1) if step not in (0, *steps.get("followers", []))]
    return steps | ({"companions": near} if near else {})


def seen_last(rows: Tensor) -> Tensor:
    """rows (B, L) -> (B, L, L) bool: none of the events after s, up to t, is of the same item."""
    place = torch.arange(rows.shape[1], device=rows.device)
    later = (rows[:, :, None] == rows[:, None, :]) & (place > place[:, None])
    following = torch.where(later, place, rows.shape[1]).amin(2)  # (B, s) when the item of s comes again
    return place[:, None] < following[:, None, :]
