"""Scores items for one session, in numpy: the form of the session model that serving uses.

It computes what `SessionModel.scores` computes for the last position of one prefix v_1 ... v_n, over a few items:

    score(j) = log( (1 - d(j)) * ( sum_s [ exp(w_content(s) + q_content(s) . u(j) + b_content(j))
                                         + exp(w_id(s) + q_id(s) . z(j) + b_id(j))
                                         + exp(w_next(s)) P_next(j | v_s) + exp(w_co(s)) P_co(j | v_s) ]
                                   + exp(w_popularity) P_popularity(j) )
                    + sum_{s: v_s = j} exp(w_repeat(s)) ).

Change this formula in both model.py, which explains it, and numpy_model.py; tests/session_model/test_numpy_model.py compares them.

A session has about five items of 64 numbers: PyTorch would spend three quarters of the time on the calls of its operators, and the
service two seconds on importing it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recommender.session_model.config import LEAST_MASS, LOG_ZERO, MAX_SCALE, REPEAT_DISCOUNT_RATE, ModelConfig

Arrays = Mapping[str, np.ndarray]

LARGE_ITEMS = 200_000  # of so many items the vectors are not computed ahead: that would be a copy in memory for each process
LEAST_LOGIT = -80.0  # exp of a smaller one is a subnormal float32, which takes twenty times as long


class SessionState(NamedTuple):
    """Holds an encoded session: what scoring needs of its L items."""

    rows: np.ndarray  # (L,) items, oldest first
    queries: dict[str, np.ndarray]  # (L, D) by channel, with the channel's scale; of content (L, D + 1)
    weights: dict[str, np.ndarray]  # (L,) log-weights by channel and by pair counts
    counted_items: np.ndarray  # (P,) rows of the session's items and of their pairs in the counts; an item may come several times
    counted_masses: np.ndarray  # (P,) mass that the counts give each of them
    repeat_discount: np.ndarray  # (L,) repeat discount of an item at its last occurrence; elsewhere 0
    repeat_masses: np.ndarray  # (L,) mass of the repeat component
    new_items: float = 0.0  # log-odds added to cold items


class NumpyChannels:
    """Holds the arrays of all K channels, stacked (K, ...), so that one numpy call computes every channel.

    Layers with the same input are one matrix, and the graph's message layers are multiplied into the weights of its GRU cell.
    """

    def __init__(self, channels: Sequence[Arrays], dim: int) -> None:
        self.arrays = {name: np.stack([channel[name] for channel in channels]) for name in channels[0]}
        self.scale = np.minimum(np.exp(self.arrays["log_scale"]), MAX_SCALE)  # (K,)
        self.dim = dim
        self.graph, self.attention = "graph.gate" in self.arrays, "attention.recency" in self.arrays
        if self.graph:
            halves = zip(np.split(self.arrays["graph.cell.weight_ih"], 2, axis=2), ("incoming", "outgoing"), strict=True)
            incoming, outgoing = (half @ self.arrays[f"graph.{name}.weight"] for half, name in halves)
            self.gates = np.concatenate([incoming, outgoing, self.arrays["graph.cell.weight_hh"]], 1).mT.copy()  # (K, D, 9 * D)
        layers = ["last", "weight_key", *(["attention.query", "attention.key"] if self.attention else []), "weight_bias"]
        self.layers = np.concatenate([self.arrays[f"{name}.weight"] for name in layers], 1).mT.copy()  # (K, D, 2 or 4 * D + 1)

    def encode(self, states: np.ndarray, before: np.ndarray, after: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes queries (K, L, D), and log-weights (K, L) at the last position, as `Channel.forward` does: states (K, L, D), before and
        after (L, L) from `transitions`, back (L, L) steps, negative for later positions."""
        dim, arrays = self.dim, self.arrays
        if self.graph:
            states = states + arrays["graph.gate"][:, None, None] * (self.gru_cell(states, before, after) - states)
        outputs = states @ self.layers
        queries, weight_keys, biases = outputs[..., :dim], outputs[..., dim : 2 * dim], outputs[..., -1] + arrays["weight_bias.bias"]
        if self.attention:
            attention_queries = outputs[..., 2 * dim : 3 * dim] + arrays["attention.query.bias"][:, None]
            logits = attention_queries @ outputs[..., 3 * dim : 4 * dim].mT / dim**0.5 + arrays["attention.recency"][:, back]
            logits = np.where(back >= 0, logits, LOG_ZERO)
            weights = np.exp(logits - logits.max(2, keepdims=True))
            queries = queries + weights / weights.sum(2, keepdims=True) @ states @ arrays["attention.output.weight"].mT
        queries = queries * (self.scale[:, None, None] / np.maximum(np.linalg.norm(queries, axis=2, keepdims=True), 1e-12))
        weight_queries = states[:, -1:] @ arrays["weight_query.weight"].mT + arrays["weight_query.bias"][:, None]
        return queries, (weight_queries @ weight_keys.mT)[:, 0] / dim**0.5 + biases + arrays["weight_recency"][:, back[-1]]

    def gru_cell(self, states: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Computes the GRU cell of the session graph, with the neighbours' messages as its input."""
        dim, outputs = self.dim, states @ self.gates
        new = before @ outputs[..., : 3 * dim] + after @ outputs[..., 3 * dim : 6 * dim] + self.arrays["graph.cell.bias_ih"][:, None]
        old = outputs[..., 6 * dim :] + self.arrays["graph.cell.bias_hh"][:, None]
        gates = 0.5 + 0.5 * np.tanh(0.5 * (new[..., : 2 * dim] + old[..., : 2 * dim]))  # the logistic function
        candidate = np.tanh(new[..., 2 * dim :] + gates[..., :dim] * old[..., 2 * dim :])
        updated: np.ndarray = candidate + gates[..., dim:] * (states - candidate)
        return updated


class ChannelVectors:
    """Computes the vectors of a channel from a table, which may lie in a file, for the rows that are asked for."""

    def __init__(self, table: np.ndarray, project: np.ndarray | None, known: np.ndarray) -> None:
        """table (N, d); `project` (D, d): of content, which gets a number more that is 1 for a cold item; None: of ids, zero for those."""
        self.table, self.project, self.known = table, project, known
        self.shape = len(table), table.shape[1] if project is None else len(project) + 1

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns the vectors (C, D) or (C, D + 1) of `rows` (C,)."""
        values, known = self.table.take(rows, axis), self.known.take(rows)[:, None]
        if self.project is None:
            warm: np.ndarray = unit(values) * known
            return warm
        return np.concatenate([unit(values @ self.project.T), ~known], 1, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.table)


class NumpyPairCounts:
    """Holds the arrays of a `PairCounts` table, with the index of each item's first entry."""

    def __init__(self, pairs: Arrays) -> None:
        self.keys, self.counts, self.totals, self.distinct = (pairs[name] for name in ("keys", "counts", "totals", "distinct"))
        self.recency, self.evidence = pairs["recency"], pairs["evidence"]
        self.items = len(self.totals)
        begin = np.searchsorted(self.keys, np.arange(self.items + 1) * self.items)
        self.begin = begin.astype(np.int32) if len(self.keys) < 2**31 else begin  # half the memory, which every process has of its own
        self.discount = 1 / (1 + float(np.exp(-pairs["discount"])))

    def weights(self, rows: np.ndarray, back: np.ndarray) -> np.ndarray:
        """Computes the log-weights (L,) of the session's items rows (L,), which were seen `back` (L,) steps ago."""
        total = self.totals[rows]
        evidence = self.evidence[0] + self.evidence[1] * np.log(np.maximum(total, 1))
        return np.where(total < 1, LOG_ZERO, evidence + self.recency[back])

    def masses(self, rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lists every pair (i, j) of the session's items rows (L,) with log-weights (L,): the rows of j and exp(weight of i) * P(j | i),
        (P,) both."""
        begin = self.begin[rows]
        length = self.begin[rows + 1] - begin
        end = np.cumsum(length)
        entry = np.arange(end[-1]) + np.repeat(begin - end + length, length)
        scale = np.repeat(np.exp(weights) / self.discounted_totals(rows), length)
        return self.keys[entry] - np.repeat(rows * self.items, length), np.maximum(self.counts[entry] - self.discount, 0) * scale

    def shares(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Computes P(j | i) for i in rows (L,) and j in items (C,): (L, C)."""
        if not len(self.keys):
            return np.zeros((len(rows), len(items)), np.float32)
        keys = rows[:, None] * self.items + items
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        count = np.where(self.keys[place] == keys, self.counts[place], 0)
        shares: np.ndarray = np.maximum(count - self.discount, 0) / self.discounted_totals(rows)[:, None]
        return shares

    def discounted_totals(self, rows: np.ndarray) -> np.ndarray:
        """Computes the denominators (L,) of P(j | i) for i in rows (L,)."""
        totals: np.ndarray = np.maximum(self.totals[rows] - self.discount * self.distinct[rows], 1e-6)
        return totals


class NumpySessionModel:
    """Encodes a session and scores items for it. It has no state besides its arrays, so threads may share it."""

    def __init__(self, config: ModelConfig, arrays: Arrays) -> None:
        """Builds the tables of vectors and priors from `arrays`, the `state_dict` of a `SessionModel`."""
        self.max_prefix, self.known = config.max_prefix, arrays["known"]
        self.cold_weights = arrays.get("cold_weights", np.zeros(3, np.float32))
        self.vectors, self.priors = tables(config, arrays)
        self.channels = NumpyChannels([submodule(arrays, f"channels.{name}") for name in self.vectors], config.dim)
        names = dict.fromkeys(key.split(".")[1] for key in arrays if key.startswith("pairs."))
        self.pairs = {name: NumpyPairCounts(submodule(arrays, f"pairs.{name}")) for name in names}
        self.repeat_weights, self.popularity_weight = arrays.get("repeat_weights"), float(arrays["popularity_weight"])
        logits = arrays.get("repeat_discount")
        self.repeat_discount = None if logits is None else 0.5 + 0.5 * np.tanh(0.5 * REPEAT_DISCOUNT_RATE * logits)
        self.by_popularity = np.argsort(-self.priors["popularity"], kind="stable").astype(np.int32)

    @classmethod
    def of(cls, model: Any) -> "NumpySessionModel":
        """Builds it from a `SessionModel`, whose tensors it shares: they must not change."""
        return cls(model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()})

    def encode(self, session: list[int], new_items: float = 0.0) -> SessionState:
        """Encodes a session of rows, not empty, by its last `max_prefix` items. `new_items`: log-odds added to cold items."""
        rows = np.array(session[-self.max_prefix :])
        place = np.arange(len(rows))
        back = place[:, None] - place  # (L, L), negative for later positions
        before, after = transitions(rows, back >= 0)
        states = np.stack([vectors.take(rows, 0)[:, : self.channels.dim] for vectors in self.vectors.values()])
        encoded = self.channels.encode(states, before, after, back)
        queries, weights = (dict(zip(self.vectors, by_channel, strict=True)) for by_channel in encoded)
        if "content" in queries:
            cold_weight = np.where(self.known[rows, None], self.cold_weights[0], self.cold_weights[1])
            queries["content"] = np.concatenate([queries["content"], cold_weight], 1)
        if "id" in weights:
            weights["id"] = np.where(self.known[rows], weights["id"], LOG_ZERO)
        counted_items, counted_masses = [rows], [np.zeros(len(rows))]
        for name, pairs in self.pairs.items():
            weights[name] = pairs.weights(rows, back[-1])
            items, masses = pairs.masses(rows, weights[name])
            counted_items.append(items)
            counted_masses.append(masses)
        repeat = np.zeros(len(rows)) if self.repeat_weights is None else np.exp(self.repeat_weights[back[-1]])
        comes_again = ((rows[:, None] == rows) & (back < 0)).any(1)  # a later event of the session has the same item
        discount = np.zeros(len(rows)) if self.repeat_discount is None else np.where(comes_again, 0, self.repeat_discount[back[-1]])
        counted = np.concatenate(counted_items), np.concatenate(counted_masses)
        return SessionState(rows, queries, weights, *counted, discount, repeat, new_items)

    def scores(self, state: SessionState, items: np.ndarray) -> np.ndarray:
        """Computes the scores (C,) of `items` (C,), ascending."""
        total = np.exp(self.priors["popularity"].take(items) + self.popularity_weight)
        for name in self.vectors:
            total += np.exp(state.weights[name]) @ self.channel_masses(state, name, items)
        place, scored = find(items, state.counted_items)
        total += np.bincount(place[scored], state.counted_masses[scored], len(items)).astype(total.dtype)
        place, scored = find(items, state.rows)
        np.multiply.at(total, place[scored], (1 - state.repeat_discount[scored]).astype(total.dtype))
        np.add.at(total, place[scored], state.repeat_masses[scored].astype(total.dtype))
        scores: np.ndarray = np.log(np.maximum(total, LEAST_MASS))
        if state.new_items:
            scores += np.float32(state.new_items) * ~self.known[items]
        return scores

    def channel_masses(self, state: SessionState, name: str, items: np.ndarray) -> np.ndarray:
        """Computes the mass that each query of a channel gives each of `items` (C,), before the query's weight: (L, C)."""
        masses: np.ndarray = state.queries[name] @ self.vectors[name].take(items, 0).T  # `take` is three times as fast as [items]
        masses += self.priors[name].take(items)
        np.exp(np.maximum(masses, LEAST_LOGIT, out=masses), out=masses)
        if name == "id":
            masses *= self.known.take(items)
        return masses

    def origins(self, state: SessionState, items: np.ndarray, shares: dict[str, np.ndarray]) -> np.ndarray:
        """Splits the masses of `items` (C,), none of them in the session, by origin (L + 1, C): channels and counts at each position of the
        session, and, in the last line, popularity. `shares` are those of the counts."""
        masses = np.zeros((len(state.rows) + 1, len(items)), np.float32)
        for name in self.vectors:
            masses[:-1] += np.exp(state.weights[name])[:, None] * self.channel_masses(state, name, items)
        for name, share in shares.items():
            masses[:-1] += np.exp(state.weights[name])[:, None] * share
        masses[-1] = np.exp(self.priors["popularity"][items] + self.popularity_weight)
        return masses

    def shares(self, state: SessionState, items: np.ndarray) -> dict[str, np.ndarray]:
        """Computes, for each pair counts by name, P(j | i) for i in the session and j in `items` (C,): (L, C)."""
        return {name: pairs.shares(state.rows, items) for name, pairs in self.pairs.items()}


def tables(config: ModelConfig, arrays: Arrays) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Computes `SessionModel.tables`: vectors (N, D) by channel, of many items as `ChannelVectors`; priors (N,) by channel, and
    "popularity"."""
    known, predicted = arrays["known"], arrays.get("popularity_prior", np.float32(0))
    prior = arrays["prior_share"] + predicted
    log_count = np.where(known, np.log(arrays["counts"] + np.exp(prior)), prior if config.hides_ids else predicted)
    level = -float(np.log(max(int(known.sum()), 1)))
    vectors: dict[str, Any] = {}
    priors = {}
    popularity = arrays.get("popularity_exponent", np.float32(0)) * log_count
    if "channels.content.log_scale" in arrays:
        vectors["content"] = ChannelVectors(arrays["content"], arrays["project.weight"], known)
        priors["content"] = arrays.get("channels.content.popularity_exponent", np.float32(0)) * log_count + level
        popularity = popularity + arrays["cold_weights"][2] * ~known
    else:
        popularity = np.where(known, popularity, np.float32(LOG_ZERO))
    if "channels.id.log_scale" in arrays:
        vectors["id"] = ChannelVectors(arrays["ids.weight"], None, known)
        id_prior = arrays.get("channels.id.popularity_exponent", np.float32(0)) * log_count + level
        priors["id"] = np.where(known, id_prior, np.float32(LOG_ZERO))
    if len(known) < LARGE_ITEMS:
        vectors = {name: computed.take(np.arange(len(known))) for name, computed in vectors.items()}
    greatest = popularity[known].max(initial=LOG_ZERO)
    priors["popularity"] = popularity - (greatest + np.log(np.exp(popularity[known] - greatest).sum()))
    return vectors, priors


def find(items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds `rows` in `items` (C,), ascending: the index of each, and (bool) whether it is among the items."""
    place = np.minimum(np.searchsorted(items, rows), len(items) - 1)
    return place, items[place] == rows


def submodule(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """Selects the arrays of one module of the model, by their names in that module."""
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors (N, D) to length one; zero vectors stay zero."""
    scaled: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def transitions(rows: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes `recommender.session_model.channel.transitions` of one session: rows (L,), causal mask (L, L) bool -> (L, L) twice."""
    same = (rows[:, None] == rows) & mask
    before, after = np.zeros(same.shape, np.float32), np.zeros(same.shape, np.float32)
    before[:, :-1] = same[:, 1:]
    after[:, 1:] = same[:, :-1] & mask[:, 1:]
    return tuple(counts / np.maximum(counts.sum(1, keepdims=True), 1) for counts in (before, after))  # type: ignore[return-value]
