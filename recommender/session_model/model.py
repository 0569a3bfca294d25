"""Scores all items for the prefixes of sessions, in PyTorch: the form of the session model that training, evaluation and batches use.

The model is a mixture. Each component gives an item a mass, and the score of item j after the prefix v_1 ... v_n is

    score(j) = log( (1 - d(j)) * ( sum_s [ exp(w_content(s) + q_content(s) . u(j) + b_content(j))
                                         + exp(w_id(s) + q_id(s) . z(j) + b_id(j))
                                         + exp(w_next(s)) P_next(j | v_s) + exp(w_co(s)) P_co(j | v_s) ]
                                   + exp(w_popularity) P_popularity(j) )
                    + sum_{s: v_s = j} exp(w_repeat(s)) ).

Change this formula in both model.py and numpy_model.py; tests/session_model/test_numpy_model.py compares them.

- Channels: the content channel has the vectors u, projected from the whitened exported embeddings, the id channel has learned vectors z.
  Each has a session graph, attention, a query q(s) at each position and log-weights w(s). A cold item has no z: the id channel neither
  reads nor offers it. ID dropout hides the ids of random items in training so that the model learns to rank cold items by content.
- Next-item counts P_next and co-occurrence counts P_co of the training sessions, without those of the session itself.
- Popularity prior b and P_popularity: an item's training count plus a learned share of the count predicted from its content.
- Repeat discount d(j): the share of the other components' mass that an item of the prefix loses, by how long ago it was last seen; 0 for
  other items. By content an item is most similar to itself, but whether visitors come back to it is another question.

The masses are added because in a sum of vectors or of logits a weak channel spoils a strong one for every item, while in a mixture a
component without evidence for the case has a low weight. Position t reads only events up to t, so one pass answers every prefix of a
session.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.session_model.channel import Channel
from recommender.session_model.co_occurrence import directions
from recommender.session_model.config import LEAST_MASS, LOG_ZERO, REPEAT_DISCOUNT_RATE, ModelConfig
from recommender.session_model.losses import log_partition
from recommender.session_model.negative_sampling import Candidates
from recommender.session_model.ops import causal, find, last_occurrences, packed, padded, steps_back
from recommender.session_model.pair_counts import PairCounts, pair_steps
from recommender.session_model.popularity_prior import fit_popularity_prior
from recommender.session_model.windows import PAD

ID_STD = 0.1  # of the numbers of a random id vector
# Vectors that start from directions are this much longer: only their angles count, and a longer one turns more slowly. Otherwise ids have
# memorised the training sessions before the content channel has learned
START_LENGTH = 3.0
LOG2E = float(np.log2(np.e))  # exp2 takes half the time of exp, and no longer for small numbers


class Tables(NamedTuple):
    """Holds what sessions are scored against: per channel the item vectors and log-priors, and whose id is shown."""

    vectors: dict[str, Tensor]  # (N, D) by channel, or (M, D) of `items`; of content (N, D + 1), the last number 1 for a cold item
    priors: dict[str, Tensor]  # (N,) by channel; also "popularity"
    known: Tensor  # (N,) bool: items whose id is used, the warm ones that ID dropout does not hide
    items: Tensor | None = None  # (M,) ascending, the items of a training step; None: all

    def lookup(self, channel: str, rows: Tensor) -> Tensor:
        """Looks up the vectors of `rows`, of any shape; a row that is not among `items` gets another item's."""
        if self.items is not None:
            rows = torch.searchsorted(self.items, rows).clamp(max=len(self.items) - 1)
        return self.vectors[channel][rows]


class WindowState(NamedTuple):
    """Holds the encoded windows: queries at each position t, and log-weights of the components at (t, s <= t)."""

    queries: dict[str, Tensor]  # (B, L, D) by channel, with the channel's scale; of content (B, L, D + 1)
    weights: dict[str, Tensor]  # (B, L, L) by channel; also "repeat"
    repeat_discount: Tensor  # (B, L, L) logit of the repeat discount at (t, last occurrence of an item up to t); elsewhere LOG_ZERO
    popularity_weight: Tensor  # () log-weight


class Mixture(NamedTuple):
    """Holds what ranking needs of B windows, C positions of each of which are scored."""

    rows: Tensor  # (B, L)
    queries: dict[str, Tensor]  # (B, L, D) by channel, in units of log2
    weights: dict[str, Tensor]  # (B, C, L) weights of the components at each position; also "repeat" and the pair counts
    repeat_discount: Tensor  # (B, C, L) repeat discount of the item at its last occurrence; elsewhere 0
    popularity_weight: Tensor  # () weight

    def select(self, part: slice) -> "Mixture":
        """Selects some of the windows."""
        queries = {name: query[part] for name, query in self.queries.items()}
        weights = {name: weight[part] for name, weight in self.weights.items()}
        return Mixture(self.rows[part], queries, weights, self.repeat_discount[part], self.popularity_weight)


class ComponentLogits(NamedTuple):
    """Holds the log-masses that a training step needs, before the repeat discount; (B, t, s): case t, component at position s."""

    target: list[Tensor]  # (B, t, s) log-mass of the target; of popularity (B, t, 1)
    total: Tensor  # (cases, K) log-mass of all candidates, by component; the last ones are popularity and the repeats
    missing: list[Tensor]  # (B, t, s) log-mass of targets that `total` leaves out, for they are not available at s's time
    window_shares: Tensor  # (B, S, L) share of each item of the window in the `total` of the first S components
    popularity: Tensor  # (N,) log-mass of every item in the popularity component
    channel_losses: Tensor  # (cases,) sum of the losses of each channel alone; () zero without channels


class SessionModel(nn.Module):
    """Scores items by content and ids (full), by ids alone (content_dim 0) or by content alone (ids False).

    `content` (N, content_dim) is whitened; `rows` and `offsets` are the training sessions in CSR form.
    """

    content: Tensor
    known: Tensor
    counts: Tensor
    popularity_prior: Tensor
    popularity_prior_projection: Tensor

    def __init__(self, config: ModelConfig, content: np.ndarray | None, rows: np.ndarray, offsets: np.ndarray) -> None:
        super().__init__()
        self.config = config
        counts = np.bincount(rows, minlength=config.items)
        known = torch.as_tensor(counts > 0)
        self.register_buffer("known", known)  # (N,) bool: warm items
        events = torch.as_tensor(counts, dtype=torch.float32)
        self.register_buffer("counts", events / events[known].log().mean().exp())  # (N,) over the geometric mean of warm items
        self.channels = nn.ModuleDict()
        self.pairs = nn.ModuleDict()
        if config.content_dim:
            self.register_buffer("content", torch.as_tensor(content, dtype=torch.float32))
            self.project = nn.Linear(config.content_dim, config.dim, bias=False)
            self.channels["content"] = Channel(config.dim, config.max_prefix, config.parts)
            # log-weights of a cold item relative to its prior: after a warm item, after a cold one, and in the popularity component
            self.cold_weights = nn.Parameter(torch.zeros(3))
            projection, predicted = fit_popularity_prior(self.content.numpy(), self.counts.numpy())
            self.register_buffer("popularity_prior_projection", torch.as_tensor(projection))
            self.register_buffer("popularity_prior", torch.as_tensor(predicted))  # (N,) log count predicted from content
        if config.ids:
            self.ids = nn.Embedding(config.items, config.dim)
            nn.init.normal_(self.ids.weight, std=ID_STD)
            if config.parts.directions and len(rows) > 1:
                start = torch.as_tensor(directions(rows, offsets, config.items, config.dim))
                length = START_LENGTH * ID_STD * config.dim**0.5
                with torch.no_grad():  # items without pairs keep the random ones
                    self.ids.weight.copy_(torch.where(start.any(1, keepdim=True), length * start, self.ids.weight))
            self.channels["id"] = Channel(config.dim, config.max_prefix, config.parts)
            for name, steps in pair_steps(config.parts).items():
                self.pairs[name] = PairCounts(rows, offsets, config.items, config.max_prefix, steps)
        self.repeat_weights = nn.Parameter(torch.full((config.max_prefix,), -4.0)) if config.parts.repeat else None
        self.repeat_discount = nn.Parameter(torch.zeros(config.max_prefix)) if config.parts.repeat else None
        self.prior_share = nn.Parameter(torch.tensor(-2.0))  # log of the share of the predicted count that is added to the training count
        self.popularity_weight = nn.Parameter(torch.tensor(-1.0))
        self.popularity_exponent = nn.Parameter(torch.tensor(0.5)) if config.parts.popularity else 0.0

    @classmethod
    def restored(cls, config: ModelConfig, tensors: dict[str, Tensor]) -> "SessionModel":
        """Builds the model whose `state_dict()` is `tensors`."""
        content = np.zeros((config.items, config.content_dim), np.float32) if config.content_dim else None
        model = cls(config, content, np.zeros(1, np.int64), np.array([0, 1]))
        for name, pairs in model.pair_counts():
            pairs.resize(len(tensors[f"pairs.{name}.keys"]))
        model.load_state_dict(tensors)
        return model

    def over(self, rows: Tensor, content: Tensor | None) -> "SessionModel":
        """Builds the same model for another catalogue: `rows` (N,) are the rows here of its items, -1 for a new item, which is cold and
        has its `content` (N, content_dim) alone."""
        tensors, count, old = dict(self.state_dict()), len(rows), rows.clamp(min=0)
        tensors |= {"known": self.known[old] & (rows >= 0), "counts": self.counts[old]}
        if content is not None:
            predicted = torch.where(tensors["known"], self.popularity_prior[old], content @ self.popularity_prior_projection)
            tensors |= {"content": content, "popularity_prior": predicted}
        if self.config.ids:
            place = torch.full((self.config.items,), -1)
            place[rows[rows >= 0]] = (rows >= 0).nonzero()[:, 0]
            tensors["ids.weight"] = self.ids.weight[old]
            for name, pairs in self.pair_counts():
                tensors |= {f"pairs.{name}.{key}": value for key, value in pairs.over(place, count).items()}
        return SessionModel.restored(replace(self.config, items=count), tensors)

    def learning(self, rows: np.ndarray, offsets: np.ndarray, counts: np.ndarray, seed: int) -> "SessionModel":
        """Builds the same model with the sessions `rows`, `offsets` added to its counts, to be trained further: `counts` (N,) are the
        events of each item in all sessions. The calibrated weights are frozen."""
        tensors = dict(self.state_dict())
        known = torch.as_tensor(counts > 0)
        events = torch.as_tensor(counts, dtype=torch.float32)
        tensors |= {"known": known, "counts": events / events[known].log().mean().exp()}
        if self.config.content_dim:
            projection, predicted = fit_popularity_prior(self.content.numpy(), tensors["counts"].numpy())
            tensors |= {"popularity_prior_projection": torch.as_tensor(projection), "popularity_prior": torch.as_tensor(predicted)}
        if self.config.ids:
            new = known & ~self.known  # their id vectors are untrained: drawn anew
            drawn = ID_STD * torch.randn(self.ids.weight.shape, generator=torch.Generator().manual_seed(seed))
            tensors["ids.weight"] = torch.where(new[:, None], drawn, self.ids.weight)
            for name, pairs in self.pair_counts():
                tensors |= {f"pairs.{name}.{key}": value for key, value in pairs.plus(rows, offsets).items()}
        model = SessionModel.restored(self.config, tensors)
        calibrated = [model.repeat_weights] if model.repeat_weights is not None else []
        calibrated += [model.channel("id").weight_bias.bias] if self.config.ids else []
        calibrated += [model.cold_weights] if self.config.content_dim else []
        for weight in calibrated:
            weight.requires_grad_(False)
        return model

    def tables(self, known: Tensor | None = None, items: Tensor | None = None) -> Tables:
        """Computes the item tables: vectors of all items or of `items` (M,) alone, and priors of all. `known` (N,) bool tells whose id is
        used (in training all but those hidden by ID dropout); None: all warm items."""
        selected = slice(None) if items is None else items
        known = self.known if known is None else known
        log_count = self.log_counts(known)
        level = -float(np.log(max(int(self.known.sum()), 1)))  # a channel's masses start near a distribution, like the counts' shares
        vectors, priors = {}, {}
        if "content" in self.channels:
            vectors["content"] = torch.cat([F.normalize(self.project(self.content[selected]), dim=-1), ~known[selected, None]], -1)
            priors["content"] = self.channel("content").popularity_exponent * log_count + level
            priors["popularity"] = self.popularity_exponent * log_count + self.cold_weights[2] * ~known
        else:
            priors["popularity"] = (self.popularity_exponent * log_count).masked_fill(~known, LOG_ZERO)
        if "id" in self.channels:
            ids = self.ids.weight if items is None else self.ids(items)
            vectors["id"] = F.normalize(ids, dim=-1) * known[selected, None]
            priors["id"] = (self.channel("id").popularity_exponent * log_count + level).masked_fill(~known, LOG_ZERO)
        priors["popularity"] = priors["popularity"] - priors["popularity"][self.known].logsumexp(0)
        return Tables(vectors, priors, known, items)

    def log_counts(self, known: Tensor) -> Tensor:
        """Computes the smoothed log counts (N,): log(count + share * predicted count) for a known item, the log of the second term for a
        cold item. Without ID dropout no training step fits that share for cold items, so theirs is the predicted count itself."""
        predicted = self.popularity_prior if "content" in self.channels else torch.zeros_like(self.counts)
        prior = self.prior_share + predicted
        return torch.where(known, (self.counts + prior.exp()).log(), prior if self.config.hides_ids else predicted)

    def forward(
        self, rows: Tensor, targets: Tensor, known: Tensor, candidates: Candidates, generator: torch.Generator, times: Tensor | None = None
    ) -> Tensor:
        """Computes the training losses (cases,) of windows (B, L) whose targets are among the candidates; `times` as in `Windows`."""
        touched = None
        if len(candidates.items) < self.config.items / 2:
            touched = torch.cat([candidates.items, rows[rows != PAD]]).unique()  # type: ignore[no-untyped-call]
        return self.losses(rows, targets, self.tables(known, touched), candidates, times)

    def channel(self, name: str) -> Channel:
        channel = self.channels[name]
        assert isinstance(channel, Channel)
        return channel

    def pair_counts(self) -> Iterator[tuple[str, PairCounts]]:
        """Yields the next-item counts and the co-occurrence counts, those that the model has, by name."""
        for name, pairs in self.pairs.items():
            assert isinstance(pairs, PairCounts)
            yield name, pairs

    def draw_known(self, generator: torch.Generator) -> Tensor:
        """Draws the items whose id a training step uses, (N,) bool: ID dropout of whole items, from a generator on the CPU."""
        if not self.config.hides_ids:
            return self.known
        return self.known & (torch.rand(self.config.items, generator=generator) >= self.config.id_dropout).to(self.known.device)

    def encode(self, rows: Tensor, tables: Tables) -> WindowState:
        """Encodes windows rows (B, L), padded on the right."""
        real = rows != PAD
        item = rows.clamp(min=0)
        queries, weights = {}, {}
        for name, channel in self.channels.items():
            states = tables.lookup(name, item)[..., : self.config.dim] * real[..., None]
            queries[name], weights[name] = channel(states, rows, real)
        if "content" in queries:
            cold_weight = torch.where(tables.known[item], self.cold_weights[0], self.cold_weights[1])
            queries["content"] = torch.cat([queries["content"], cold_weight[..., None]], -1)
        if "id" in weights:
            weights["id"] = weights["id"].masked_fill(~tables.known[item][:, None, :], LOG_ZERO)
        back = steps_back(rows.shape[1], rows.device)
        mask = causal(rows.shape[1], rows.device) & real[:, None, :]
        no_repeat = torch.full_like(back, LOG_ZERO, dtype=self.popularity_weight.dtype)
        repeat = no_repeat if self.repeat_weights is None else self.repeat_weights[back]
        weights["repeat"] = repeat.masked_fill(~mask, LOG_ZERO)
        discount = no_repeat if self.repeat_discount is None else REPEAT_DISCOUNT_RATE * self.repeat_discount[back]
        discount = discount.masked_fill(~(mask & last_occurrences(rows)), LOG_ZERO)
        return WindowState(queries, weights, discount, self.popularity_weight)

    def losses(self, rows: Tensor, targets: Tensor, tables: Tables, candidates: Candidates, times: Tensor | None = None) -> Tensor:
        """Computes -log P(target | prefix) of every case of windows (B, L), (cases,), plus `own_loss` times the loss of each channel alone.

        The channels' masses are summed over the `candidates`. Without its own loss a channel only fits the residual of the count-based
        components, which is mostly noise.
        """
        state = self.encode(rows, tables)
        logits = self.component_logits(rows, targets, state, tables, candidates, times)
        log_total = log_denominator(logits, targets)
        log_target, log_all = self.discount_repeats(rows, targets, state, logits, log_total)
        return log_all - log_target + self.config.own_loss * logits.channel_losses

    def component_logits(
        self, rows: Tensor, targets: Tensor, state: WindowState, tables: Tables, candidates: Candidates, times: Tensor | None
    ) -> ComponentLogits:
        """Computes the log-masses of every component for the targets and for all candidates, before the repeat discount."""
        real, case = rows != PAD, targets != PAD
        item, target = rows.clamp(min=0), targets.clamp(min=0)
        known = tables.known[item][:, None, :]
        target_logits, total_logits, missing, window_shares = [], [], [], []
        channel_losses = torch.zeros((), device=rows.device)
        items, correction = candidates.items, candidates.correction
        hidden = candidates.hidden(None if times is None else times[real], targets[real])  # (E, C) of the real positions
        missed = candidates.missed(times, targets)  # (B, t, s): a target counts in the sums of every position
        for name, query in state.queries.items():
            prior = tables.priors[name]
            sums = log_partition(packed(query, real), tables.lookup(name, items), prior[items] + correction, hidden)
            total = padded(sums[:, None], real)[..., 0]
            target_logit = tables.lookup(name, target) @ query.transpose(1, 2) + prior[target][..., None]
            target_logits.append(state.weights[name] + target_logit)
            total_logits.append(state.weights[name] + total[:, None, :])
            channel_total = [total_logits[-1]]
            if missed is not None:
                missing.append(target_logits[-1].masked_fill(~missed, LOG_ZERO))
                channel_total.append(missing[-1])
            window_logits = query @ tables.lookup(name, item).transpose(1, 2) + prior[item][:, None, :]
            window_shares.append((window_logits - total[..., None]).clamp(max=0).exp())
            channel_losses = channel_losses + torch.cat(channel_total, -1)[case].logsumexp(-1) - target_logits[-1][case].logsumexp(-1)
        for _, pairs in self.pair_counts():
            share, weights = pairs(rows, targets)
            target_share = share[..., 1:].transpose(1, 2) * tables.known[target][..., None]
            no_count = ~known | (target_share == 0)
            target_logits.append((weights + target_share.clamp(min=1e-30).log()).masked_fill(no_count, LOG_ZERO))
            total_logits.append(weights.masked_fill(~known, LOG_ZERO))
            window_shares.append(share[..., :-1] * known)
        popularity = tables.priors["popularity"] + state.popularity_weight
        target_logits.append(popularity[target][..., None])
        popularity_total = state.popularity_weight.expand(*rows.shape, 1)
        if hidden is not None:  # less the share of P_popularity that unavailable candidates have
            mass = (tables.priors["popularity"][items] + correction).exp()
            popularity_total = popularity_total + padded((1 - hidden.float() @ mass / mass.sum()).clamp(min=1e-6).log()[:, None], real)
        totals = torch.cat([*total_logits, popularity_total, state.weights["repeat"]], -1)[case]
        return ComponentLogits(target_logits, totals, missing, torch.cat(window_shares, 1), popularity, channel_losses)

    def discount_repeats(
        self, rows: Tensor, targets: Tensor, state: WindowState, logits: ComponentLogits, log_total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Applies the repeat discount and adds the repeat component: log-mass of the target (cases,), and of all items (cases,).

        Only items of the prefix lose mass, so the sum over all items loses the sum over s of d(v_s) times the mass of v_s, here computed as
        shares of the undiscounted total.
        """
        case, item = targets != PAD, rows.clamp(min=0)
        weights = padded(((logits.total[:, : logits.window_shares.shape[1]] - log_total) * LOG2E).exp2(), case)
        repeated = targets[..., None] == rows[:, None, :]  # (B, t, s)
        # (cases, L) mass of each item of the window, as a share of the undiscounted total
        window_mass = (weights @ logits.window_shares)[case]
        window_mass = window_mass + (logits.popularity[item][:, None, :].expand_as(repeated)[case] - log_total).exp()
        discount = state.repeat_discount[case]
        log_all = log_total[:, 0] + (1 - (window_mass * discount.sigmoid()).sum(-1)).clamp(min=1e-6).log()
        log_undiscounted = (F.logsigmoid(-discount) * repeated[case]).sum(-1, keepdim=True)
        repeat = state.weights["repeat"].masked_fill(~repeated, LOG_ZERO)[case]
        log_target = torch.cat([torch.cat(logits.target, -1)[case] + log_undiscounted, repeat], -1).logsumexp(-1)
        return log_target, log_all

    def scores(self, rows: Tensor, tables: Tables, cases: Tensor | None = None, items: Tensor | None = None) -> Tensor:
        """Computes scores (cases, N) at the positions that `cases` (B, L) bool selects; None: the last position of each prefix, none of
        which is empty. With `items` (C,), ascending: (cases, C)."""
        if cases is None:
            cases = torch.arange(rows.shape[1], device=rows.device) == (rows != PAD).sum(1, keepdim=True) - 1
        count = cases.sum(1)
        if bool((count == count[:1]).all()):
            return self.masses(self.mixture(rows, tables, cases), tables, items).clamp_(min=LEAST_MASS).log_()
        every_position = self.mixture(rows, tables, torch.ones_like(cases))
        return self.masses(every_position, tables, items)[cases.flatten()].clamp_(min=LEAST_MASS).log_()

    def mixture(self, rows: Tensor, tables: Tables, cases: Tensor) -> Mixture:
        """Computes the weights of the mixture for windows (B, L); `cases` (B, L) bool selects equally many positions of each."""
        state = self.encode(rows, tables)
        log_weights = state.weights | {name: pairs.weights(rows) for name, pairs in self.pair_counts()}
        weights = {name: weight[cases].exp().view(len(rows), -1, rows.shape[1]) for name, weight in log_weights.items()}
        discount = state.repeat_discount[cases].sigmoid().view(len(rows), -1, rows.shape[1])
        queries = {name: query * LOG2E for name, query in state.queries.items()}
        return Mixture(rows, queries, weights, discount, state.popularity_weight.exp())

    def masses(self, mixture: Mixture, tables: Tables, items: Tensor | None = None) -> Tensor:
        """Computes exp(score), which ranks alike: (B * C, N), or (B * C, M) of `items` (M,), ascending."""
        rows, queries, weights, discount, popularity_weight = mixture
        selected = slice(None) if items is None else items
        total = tables.priors["popularity"][selected].exp() * popularity_weight  # (N,), from here on (B, C, N)
        for name, query in queries.items():
            mass = (query.flatten(0, 1) @ tables.vectors[name][selected].T).exp2_().view(*rows.shape, -1)
            total = torch.addcmul(total, torch.bmm(weights[name], mass), tables.priors[name][selected].exp())
        # counts and repeats concern a few items of each case: they are added sparsely
        place, scored = rows.clamp(min=0), rows != PAD
        if items is not None:
            place, scored = find(items, place, scored)
        for name, pairs in self.pair_counts():
            pairs.add(total, rows, weights[name], items)
        event = place[:, None].expand_as(discount)
        total.scatter_reduce_(2, event, 1 - discount * scored[:, None], "prod")
        total.scatter_add_(2, event, weights["repeat"] * scored[:, None])
        return total.flatten(0, 1)


def log_denominator(logits: ComponentLogits, targets: Tensor) -> Tensor:
    """Sums the masses of all components over all candidates and the target, before the repeat discount: (cases, 1), as a log."""
    case = targets != PAD
    return torch.cat([logits.total, *(missing[case] for missing in logits.missing)], -1).logsumexp(-1, keepdim=True)
