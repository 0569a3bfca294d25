"""Generates the sample shop: drawn products, titles, and sessions from a known law, so that the best possible score is known.

A product has a kind (in its title and its silhouette), a style (only in its text) and a colour (only in its image). It also has a
model name (only in its title) and a motif (in its image, and in a column to generate), which do not influence what follows. The
next item of a session follows from the last item (or, less often, from an earlier one):

    P(j | i) = rule * R(j | i) + companion * C(j | i) + noise * popularity(j)

R multiplies one affinity table per property (kinds that go together, the same or the partner style or colour); it can be learned
from texts and images. C is a few companions drawn at random for each item; it can only be learned from the log. Items launched late,
at the first validation or test session, never occur in a training session (cold); they have no companions.
`ceiling.json` holds the score of the true law on the test sessions.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.core.config import DataConfig, ShopConfig

KINDS = ("mug", "kettle", "lamp", "chair", "table", "vase", "bowl", "clock", "cushion", "rug", "basket", "bottle")
STYLES = ("Nordic", "Rustic", "Urban", "Coastal", "Retro", "Botanic", "Alpine", "Studio", "Heritage", "Desert")
MODELS = ("Alma", "Birk", "Cleo", "Dune", "Elin", "Faro", "Gaia", "Hugo", "Iris", "Juno", "Kito", "Luma", "Milo", "Nora", "Otis", "Pine")
COLOURS = ((208, 48, 48), (232, 136, 32), (224, 200, 48), (64, 160, 72), (48, 176, 184), (56, 96, 200), (136, 72, 184), (96, 72, 56))
MOTIFS = ("plain", "stripes", "dots", "checks")

RULE, COMPANION, NOISE = 0.65, 0.2, 0.15  # shares of the law
LAST = 0.75  # probability that the next item follows from the last one, not from an earlier one
COMPANIONS = (0.5, 0.3, 0.2)
# Silhouettes on a unit square: polygons (lists of points) and ellipses (two corners).
SHAPES: dict[str, list[tuple[str, tuple[float, ...]]]] = {
    "mug": [
        ("polygon", (0.2, 0.25, 0.65, 0.25, 0.62, 0.85, 0.23, 0.85)),
        ("ellipse", (0.55, 0.35, 0.9, 0.7)),
    ],
    "kettle": [
        ("ellipse", (0.2, 0.3, 0.75, 0.9)),
        ("polygon", (0.65, 0.5, 0.95, 0.3, 0.95, 0.4, 0.7, 0.7)),
        ("ellipse", (0.4, 0.15, 0.55, 0.32)),
    ],
    "lamp": [
        ("polygon", (0.3, 0.1, 0.7, 0.1, 0.88, 0.5, 0.12, 0.5)),
        ("polygon", (0.46, 0.5, 0.54, 0.5, 0.54, 0.85, 0.46, 0.85)),
        ("ellipse", (0.3, 0.8, 0.7, 0.95)),
    ],
    "chair": [
        ("polygon", (0.2, 0.08, 0.35, 0.08, 0.35, 0.5, 0.8, 0.5, 0.8, 0.95, 0.7, 0.95, 0.7, 0.65, 0.35, 0.65, 0.35, 0.95, 0.2, 0.95)),
    ],
    "table": [
        (
            "polygon",
            (0.05, 0.3, 0.95, 0.3, 0.95, 0.45, 0.85, 0.45, 0.85, 0.9, 0.75, 0.9, 0.75, 0.45, 0.25, 0.45, 0.25, 0.9,
             0.15, 0.9, 0.15, 0.45, 0.05, 0.45),
        ),
    ],
    "vase": [
        ("polygon", (0.38, 0.05, 0.62, 0.05, 0.55, 0.35, 0.8, 0.65, 0.62, 0.95, 0.38, 0.95, 0.2, 0.65, 0.45, 0.35)),
    ],
    "bowl": [
        ("polygon", (0.05, 0.4, 0.95, 0.4, 0.8, 0.75, 0.6, 0.85, 0.4, 0.85, 0.2, 0.75)),
    ],
    "clock": [
        ("ellipse", (0.08, 0.08, 0.92, 0.92)),
    ],
    "cushion": [
        ("polygon", (0.08, 0.15, 0.5, 0.22, 0.92, 0.15, 0.85, 0.5, 0.92, 0.85, 0.5, 0.78, 0.08, 0.85, 0.15, 0.5)),
    ],
    "rug": [
        ("polygon", (0.25, 0.35, 0.98, 0.35, 0.75, 0.75, 0.02, 0.75)),
    ],
    "basket": [
        ("polygon", (0.1, 0.45, 0.9, 0.45, 0.75, 0.92, 0.25, 0.92)),
        ("polygon", (0.2, 0.45, 0.3, 0.15, 0.7, 0.15, 0.8, 0.45, 0.72, 0.45, 0.65, 0.23, 0.35, 0.23, 0.28, 0.45)),
    ],
    "bottle": [
        ("polygon", (0.42, 0.05, 0.58, 0.05, 0.58, 0.3, 0.7, 0.42, 0.7, 0.95, 0.3, 0.95, 0.3, 0.42, 0.42, 0.3)),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Law:
    """The properties of N items, and the law of their sessions."""

    kind: np.ndarray  # (N,)
    style: np.ndarray
    colour: np.ndarray
    motif: np.ndarray
    model: np.ndarray
    cold: np.ndarray  # (N,) bool
    before: np.ndarray  # (N, N) P(j | i) before the launch of the cold items
    after: np.ndarray  # (N, N) after it
    start: np.ndarray  # (N,) popularity, from which the first item of a session is drawn


def build_law(config: ShopConfig, unseen: dict[str, np.ndarray] | None = None) -> Law:
    """Builds the shop's law.

    `unseen`: property (kind, style or colour) -> (N,) bool, the items of which it is unknown; the law then averages over its values.
    """
    rng = np.random.default_rng(config.seed)
    unseen = unseen or {}
    n = config.items
    kind, style, colour, motif, model = (rng.integers(len(v), size=n) for v in (KINDS, STYLES, COLOURS, MOTIFS, MODELS))
    cold = np.zeros(n, bool)
    cold[rng.choice(n, int(config.cold_items * n), replace=False)] = True
    popularity = (1 + rng.permutation(n)) ** -0.4
    # each kind goes with itself and two others; a style or colour with itself and one partner
    rule = (
        _going_together(kind, _affinity(len(KINDS), (0.4, 0.4, 0.18), rng), unseen.get("kind"))
        * _going_together(style, _affinity(len(STYLES), (0.6, 0.32), rng), unseen.get("style"))
        * _going_together(colour, _affinity(len(COLOURS), (0.55, 0.4), rng), unseen.get("colour"))
        * popularity
    )
    np.fill_diagonal(rule, 0)
    companions = np.zeros((n, n))
    warm = np.flatnonzero(~cold)
    for i in warm:
        companions[i, rng.choice(warm, len(COMPANIONS), replace=False)] = COMPANIONS

    def law(allowed: np.ndarray) -> np.ndarray:
        parts = ((RULE, rule * allowed), (COMPANION, companions), (NOISE, np.tile(popularity * allowed, (n, 1))))
        total = sum(share * part / np.maximum(part.sum(1, keepdims=True), 1e-12) for share, part in parts)
        rows: np.ndarray = total / total.sum(1, keepdims=True)
        return rows

    return Law(kind, style, colour, motif, model, cold, law(~cold), law(np.ones(n)), popularity)


def _affinity(size: int, shares: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws an affinity table (size, size): row a gives `shares` to a itself and to fixed others, and spreads the rest evenly."""
    table = np.full((size, size), (1 - sum(shares)) / size)
    step = rng.permutation(np.arange(1, size))
    for offset, share in zip((0, *step), shares, strict=False):
        table[np.arange(size), (np.arange(size) + offset) % size] += share
    return table


def _going_together(values: np.ndarray, affinity: np.ndarray, unseen: np.ndarray | None) -> np.ndarray:
    """Returns (N, N), the affinities of all pairs of items, from their values (N,)."""
    pairs: np.ndarray = affinity[np.ix_(values, values)]
    if unseen is not None:
        share = np.eye(len(affinity))[values]
        share[unseen] = 1 / len(affinity)
        pairs = share @ affinity @ share.T
    return pairs


def draw_shop(out: Path, shop: ShopConfig, data: DataConfig) -> None:
    """Writes items.parquet, sessions.parquet and ceiling.json into the folder `out`."""
    law = build_law(shop)
    sessions, starts = _sessions(law, shop, data)
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(_items_table(law, shop), out / "items.parquet", row_group_size=1024, write_page_checksum=True)
    lengths = [len(s) for s in sessions]
    times = np.concatenate([start + 30 * np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    events = {
        "session_id": np.repeat([f"s{n:06d}" for n in range(len(sessions))], lengths),
        "item_id": [_item_id(row) for session in sessions for row in session],
        "timestamp": times,
    }
    pq.write_table(pa.table(events), out / "sessions.parquet", write_page_checksum=True)
    test = sessions[len(sessions) - _held_out(shop, data.test) :]
    best = {"shop": shop.model_dump(), "valid": data.valid, "test": data.test, "max_prefix": data.max_prefix}
    best["metrics"] = ceiling(law, test, data.max_prefix)
    (out / "ceiling.json").write_text(json.dumps(best, indent=1) + "\n", encoding="utf-8")


def _held_out(shop: ShopConfig, share: float) -> int:
    """Returns the number of sessions in a held-out part, as `split_by_time` counts them."""
    return max(1, int(shop.sessions * share + 0.5)) if share > 0 else 0


def _item_id(row: int) -> str:
    return f"p{row:04d}"


def _sessions(law: Law, shop: ShopConfig, data: DataConfig) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws the sessions in order of time, as rows of items, and their start times in seconds."""
    rng = np.random.default_rng(shop.seed + 1)
    count = shop.sessions
    launch = count - _held_out(shop, data.test) - (_held_out(shop, data.valid) if shop.launch == "validation" else 0)
    lengths = np.minimum(2 + rng.geometric(0.3, size=count), 15)
    late = np.arange(count) >= launch
    before, after = law.before.cumsum(1), law.after.cumsum(1)
    start = np.where(law.cold, 0, law.start).cumsum(), law.start.cumsum()
    rows = np.zeros((count, lengths.max()), np.int64)
    draw = rng.random(count)
    rows[:, 0] = np.where(late, np.searchsorted(start[1] / start[1][-1], draw), np.searchsorted(start[0] / start[0][-1], draw))
    for position in range(1, rows.shape[1]):
        earlier = rng.integers(0, max(position - 1, 1), size=count)
        source = np.where((rng.random(count) < LAST) | (position == 1), position - 1, earlier)
        items, draw = rows[np.arange(count), source], rng.random(count)
        for chunk in np.array_split(np.arange(count), max(count // 1024, 1)):
            cumulative = np.where(late[chunk, None], after[items[chunk]], before[items[chunk]])
            rows[chunk, position] = np.minimum((cumulative < draw[chunk, None]).sum(1), shop.items - 1)
    starts = 1_700_000_000 + np.arange(count) * 600
    return [row[:length] for row, length in zip(rows, lengths, strict=True)], starts


def ceiling(law: Law, sessions: list[np.ndarray], max_prefix: int) -> dict[str, dict[str, float]]:
    """Returns HR, MRR and NDCG of the true law, which ranks all items for every prefix of the test sessions."""
    ranks, cold = [], []
    for session in sessions:
        for n in range(1, len(session)):
            prefix = session[max(0, n - max_prefix) : n]
            scores = (
                law.after[prefix[-1]] if len(prefix) == 1 else LAST * law.after[prefix[-1]] + (1 - LAST) * law.after[prefix[:-1]].mean(0)
            )
            ranks.append(1 + (scores > scores[session[n]]).sum() + ((scores == scores[session[n]]).sum() - 1) / 2)
            cold.append(law.cold[session[n]])
    rank, is_cold = np.array(ranks), np.array(cold)
    cases = {"all": np.ones(len(rank), bool), "warm": ~is_cold, "cold": is_cold}
    return {
        name: {f"HR@{k}": float((rank[mask] <= k).mean()) for k in (5, 10, 20)}
        | {f"MRR@{k}": float((1 / rank[mask] * (rank[mask] <= k)).mean()) for k in (5, 10, 20)}
        | {f"NDCG@{k}": float((1 / np.log2(1 + rank[mask]) * (rank[mask] <= k)).mean()) for k in (5, 10, 20)}
        for name, mask in cases.items()
        if mask.any()
    }


def _items_table(law: Law, shop: ShopConfig) -> pa.Table:
    rng = np.random.default_rng(shop.seed + 2)
    images = [
        {"bytes": draw_product(KINDS[law.kind[i]], COLOURS[law.colour[i]], MOTIFS[law.motif[i]], shop.image_size, rng), "path": None}
        for i in range(shop.items)
    ]
    return pa.table(
        {
            "item_id": [_item_id(i) for i in range(shop.items)],
            "title": [f"{STYLES[law.style[i]]} {KINDS[law.kind[i]]} {MODELS[law.model[i]]}" for i in range(shop.items)],
            "kind": [KINDS[k] for k in law.kind],
            "style": [STYLES[s] for s in law.style],
            "motif": [MOTIFS[m] for m in law.motif],
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        }
    )


def draw_product(kind: str, colour: tuple[int, int, int], motif: str, size: int, rng: np.random.Generator) -> bytes:
    """Draws a PNG of size x size pixels: the kind's silhouette, in the colour, with the motif; position, scale and shade vary a little."""
    scale, shade = size * rng.uniform(0.88, 0.96), rng.uniform(0.9, 1.05)
    left, top = rng.uniform(0, size - scale, size=2)
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    for form, points in SHAPES[kind]:
        moved = [left + x * scale if n % 2 == 0 else top + x * scale for n, x in enumerate(points)]
        (pen.polygon if form == "polygon" else pen.ellipse)(moved, fill=255)
    fill = tuple(int(min(255, c * shade)) for c in colour)
    dark = tuple(int(c * 0.4) for c in fill)
    surface = Image.new("RGB", (size, size), fill)
    pen = ImageDraw.Draw(surface)
    pitch = max(size // 8, 3)
    for a in range(0, size, pitch):
        if motif in ("stripes", "checks"):
            pen.rectangle((a, 0, a + pitch // 3, size), fill=dark)
        if motif == "checks":
            pen.rectangle((0, a, size, a + pitch // 3), fill=dark)
        if motif == "dots":
            for b in range(0, size, pitch):
                pen.ellipse((a, b, a + pitch // 2, b + pitch // 2), fill=dark)
    image = Image.new("RGB", (size, size), (250, 250, 250))  # a plain background, as in a studio: only the product differs
    image.paste(surface, mask=mask)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
