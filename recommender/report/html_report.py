"""Writes one self-contained HTML file about a run, without network access or scripts: `tpad report`.

It shows the results with their intervals, the training curves, a map of the catalogue by each half of the vectors, the index, twenty
test sessions with their recommendations and true next items, and the settings. All texts are escaped; images are small JPEGs, each
stored once and referenced where it is shown.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.artifact import decoding
from pipeline.core.errors import UserError, note
from pipeline.core.files import json_lines, read_json, replacing
from pipeline.core.progress import Steps
from pipeline.data.catalog import Catalog
from recommender.metrics.evaluator import REFIT_NOTE
from recommender.metrics.ranks import case_values
from recommender.metrics.results_table import COLUMNS, ROWS
from recommender.metrics.significance import paired_bootstrap
from recommender.report.charts import Curve, chart, plane
from recommender.retrieval.index import FLAT_ITEMS, ItemIndex, build_indexes, factory_of
from recommender.retrieval.index_tuning import CHECK_K, EFFORTS, encode_sessions, exact_kth_scores, measure
from recommender.serving.recommender import HINT, Recommender
from recommender.serving.thumbnails import catalogue_of, small
from recommender.session_model.top_k import first

SESSIONS, SEEN, SHOWN = 20, 5, 10  # test sessions; last items of each prefix; first items of its ranking
IMAGES = 300  # on a map
DOTS = 3000  # on a map
COMPARED_ITEMS = 1000  # smallest catalogue for which kinds of index are compared
MOST = 1e12  # of a step or a value in a log; larger ones are damage
SIDE, QUALITY = 56, 80  # pixels of an image; of its JPEG
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2530;background:#fff;margin:0 auto;max-width:1120px;padding:20px 16px 60px}
h1{font-size:26px;margin:8px 0 0}h2{font-size:19px;margin:40px 0 8px;border-bottom:1px solid #d8dee6;padding-bottom:4px}
h3{font-size:15px;margin:20px 0 4px}p{margin:6px 0;max-width:75ch}.dim{color:#5b6775}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid #edf0f4;vertical-align:top}
th:first-child,td:first-child{text-align:left}tr.ours td{font-weight:600;background:#f2f6fc}
td small{display:block;color:#5b6775;font-weight:400}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px 20px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:20px}
figure{margin:0}figcaption{font-size:13px;color:#36414e}figure>svg{width:100%;height:auto;display:block}
.maps figure>svg{background:#f8f9fb}.one{max-width:400px}
svg text{font:10px system-ui,sans-serif;fill:#5b6775}.key{font-weight:600;margin-left:6px}
.session{display:grid;grid-template-columns:300px minmax(0,1fr) 64px;gap:6px 22px;padding:10px 0;border-bottom:1px solid #edf0f4}
.row{display:flex;flex-wrap:wrap;gap:4px}.row svg{width:56px;height:56px;border-radius:4px;background:#f0f2f5;flex:none}
.row .hit{outline:3px solid #2f9e4f;outline-offset:-1px}.session>div>span{display:block;font-size:12px;color:#5b6775}
pre{background:#f6f7f9;padding:12px;overflow-x:auto;font-size:12.5px;line-height:1.4}
@media(max-width:1060px){.session{grid-template-columns:1fr}.row svg{width:44px;height:44px}}
"""


class Drawings:
    """Draws items as SVG: the image of an item, else the beginning of its title. Each drawing is stored once, in `definitions`."""

    def __init__(self, catalog: Catalog | None, recommender: Recommender) -> None:
        self.catalog, self.recommender = catalog, recommender
        self.drawings: dict[int, str] = {}  # row -> SVG

    def reference(self, row: int) -> str:
        """Returns SVG that shows the drawing of an item."""
        if row not in self.drawings:
            self.drawings[row] = self._draw(row)
        return f'<use href="#i{row}"/>'

    def _draw(self, row: int) -> str:
        title, place = self.recommender.titles[row], None
        if self.catalog is not None:
            place = self.catalog.row.get(self.recommender.item_ids[row])
        try:
            image = None if self.catalog is None or place is None else self.catalog.image(place)
        except UserError:  # the image cannot be decoded
            image = None
        if image is None:
            return f'<rect width="100%" height="100%" fill="#dfe5ec"/><text x="4" y="32">{escape(title[:9])}</text>'
        data = base64.b64encode(small(image, SIDE, QUALITY)).decode()
        return f'<image width="{SIDE}" height="{SIDE}" href="data:image/jpeg;base64,{data}"/>'

    def definitions(self) -> str:
        """Returns the drawings of all items that were referenced so far."""
        symbols = (f'<symbol id="i{row}" viewBox="0 0 {SIDE} {SIDE}">{svg}</symbol>' for row, svg in self.drawings.items())
        return f'<svg width="0" height="0" aria-hidden="true" style="position:absolute">{"".join(symbols)}</svg>'

    def boxed(self, row: int, hit: bool = False, note: str = "") -> str:
        """Returns an item as an image of its own, framed if it is a `hit`."""
        label = escape(f"{self.recommender.titles[row]} ({self.recommender.item_ids[row]}){note}")
        return f'<svg role="img" aria-label="{label}"{" class=hit" if hit else ""}><title>{label}</title>{self.reference(row)}</svg>'


def write_report(run: Path, data: Path | None, config: str) -> Path:
    """Writes `run/report.html` and returns its path. `config` is the YAML of the settings; without a data folder there are no images."""
    recommender = Recommender.load(run)
    catalog = None
    try:
        catalog = catalogue_of(recommender.version, data)
    except UserError as error:  # the report is written without images
        note(f"no images: {error}")
    with decoding(recommender.version.path, HINT):
        page = render(run, recommender, Drawings(catalog, recommender), config)
    path = run / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(run: Path, recommender: Recommender, images: Drawings, config: str) -> str:
    """Returns the page."""
    metrics = read_json(recommender.version.path / "metrics.json")
    manifest = recommender.version.manifest
    facts = metrics["facts"]
    counts = ", ".join(f"{facts[f'{name}_sessions']:,} {name} sessions" for name in ("train", "valid", "test"))
    parts = [
        f"<h1>{escape(run.resolve().name)}</h1>",
        f'<p class="dim">session model {recommender.version.name}, embeddings {escape(manifest["embeddings_version"] or "none")}; '
        f"{facts['items']:,} items, {facts['cold_items']:,} of them in no training session; {counts}</p>",
        *section("Results", results(metrics, recommender.version.path / "ranks.parquet")),
        *section("Test sessions", sessions(recommender, images)),
        *section("The catalogue, by each half of the vectors", maps(recommender, images)),
        *section("Training of the MLLM", distillation(run / "distill" / "metrics.jsonl")),
        *section("Training of the session model", training(run / "sbr-train" / "metrics.jsonl")),
        *section("Index", index(recommender)),
        *section("Settings", [f"<pre>{escape(config)}</pre>"]),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>tpad: {escape(run.resolve().name)}</title>'
        f"<style>{STYLE}</style></head><body>"
    )
    return "\n".join([head, images.definitions(), *parts, "</body></html>\n"])


def section(title: str, content: Iterator[str] | Sequence[str]) -> list[str]:
    """Returns a section; empty without content."""
    parts = [part for part in content if part]
    return [f"<section><h2>{escape(title)}</h2>", *parts, "</section>"] if parts else []


# --- results


def results(metrics: Mapping[str, Any], ranks: Path) -> Iterator[str]:
    """Yields the table of results, and the differences of full to ID-only and content-only."""
    table = pq.read_table(ranks).to_pydict() if ranks.exists() else {"session_id": []}
    number = np.unique(np.array(table["session_id"], dtype=str), return_inverse=True)[1]
    yield "<p>Next item, every position of every test session, all items ranked. In small print: the 95 % interval (bootstrap over "
    yield "test sessions, for the models whose ranks are stored), or the standard deviation over seeds.</p>"
    if metrics["facts"].get("refit"):
        yield f"<p>{escape(REFIT_NOTE.capitalize())}.</p>"
    if summary := metrics["facts"].get("calibration", {}).get("told"):
        yield f"<p>{escape(summary.capitalize())}.</p>"
    first = metrics["results"]["popularity"]["mean"]
    heads = [
        f"<th>{metric if bucket == 'all' else f'{bucket} {metric}'}<br><small>{int(first[bucket]['cases']):,} cases</small></th>"
        for bucket, metric in COLUMNS
    ]
    yield f'<div class="scroll"><table><tr><th>model</th>{"".join(heads)}</tr>'
    for name in sorted(metrics["results"], key=ROWS.index):
        result, cells = metrics["results"][name], []
        for bucket, metric in COLUMNS:
            value = result["mean"].get(bucket, {}).get(metric)
            note = ""
            if result["seeds"] > 1:
                note = f"± {result['std'][bucket][metric]:.4f}"
            elif bucket == "all" and name in table:
                values = case_values(np.array(table[name]), metric)
                interval = paired_bootstrap(values, np.zeros(len(values)), number, draws=2000)
                note = f"{interval.low:.4f} – {interval.high:.4f}"
            cells.append(f"<td>{'–' if value is None else f'{value:.4f}'}{f'<small>{note}</small>' if note else ''}</td>")
        yield f"<tr{' class=ours' if name == 'full' else ''}><td>{escape(name)}</td>{''.join(cells)}</tr>"
    yield "</table></div>"
    if "full" in table:
        for other in (name for name in ("ID-only", "content-only") if name in table):
            ours, theirs = (case_values(np.array(table[name]), "MRR@20") for name in ("full", other))
            gain = paired_bootstrap(ours, theirs, number)
            yield f"<p>MRR@20 of full minus that of {other}: {gain.mean:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}.</p>"


# --- curves


def is_point(pair: tuple[Any, Any]) -> TypeGuard[tuple[float, float]]:
    """Returns whether both are finite numbers; a damaged log may hold anything."""
    return all(isinstance(number, int | float) and abs(number) < MOST for number in pair)


def distillation(path: Path) -> Iterator[str]:
    """Yields the training curves of the MLLM, by phase."""
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}  # phase -> name -> (step, value)
    for line in json_lines(path):
        curves = phases.setdefault(str(line.get("phase", "")), {})
        for name, value in line.items():
            if name not in ("phase", "step") and is_point(point := (line.get("step"), value)):
                curves.setdefault(name, []).append(point)
    for phase, curves in phases.items():
        yield f'<h3>{escape(phase)}</h3><div class="grid">'
        for name in (name for name in curves if not (name.startswith("held_out_") and name.removeprefix("held_out_") in curves)):
            held_out = curves.get(f"held_out_{name}", [])
            yield chart(name.replace("_", " "), {"training": curves[name], "held out": held_out})
        yield "</div>"


def training(path: Path) -> Iterator[str]:
    """Yields the loss curves of the session models."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for line in json_lines(path):
        name = f"{line.get('model')}, seed {line.get('seed')}"
        if is_point(point := (line.get("step"), line.get("loss"))):
            losses.setdefault(name, []).append(point)
    yield f'<div class="one">{chart("loss", losses)}</div>' if losses else ""


# --- catalogue, index, sessions


def maps(recommender: Recommender, images: Drawings) -> Iterator[str]:
    """Yields a map of the items for each half of the vectors: their first two principal components."""
    if not recommender.halves:
        return
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(len(recommender.item_ids))[:DOTS])
    chosen = rng.permutation(len(rows))[:IMAGES].tolist()
    yield f"<p>The first two principal components; {len(chosen)} items as images, up to {DOTS:,} as dots.</p>"
    yield '<div class="maps">'
    for half, vectors in recommender.halves.items():
        centred = vectors[rows] - vectors[rows].mean(0, dtype=np.float64)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        title = {"knowledge": "knowledge: the content of items", "transition": "transition: the next items"}[half]
        yield plane(title, centred @ axes[:2].T, {n: images.reference(int(rows[n])) for n in chosen})
    yield "</div>"


def index(recommender: Recommender) -> Iterator[str]:
    """Yields recall and latency of the published index, measured now on this machine; of a small catalogue, of the other kinds too."""
    published = recommender.version.manifest["index"]
    items, item_index = len(recommender.item_ids), recommender.index
    others = [
        name
        for name in ("flat", "hnsw", "ivf")
        if COMPARED_ITEMS <= items <= FLAT_ITEMS and factory_of(name, items) != published["factory"]
    ]
    curves: dict[str, Curve] = {}
    prefixes = encode_sessions(item_index.model, recommender.sample_rows())
    worst = exact_kth_scores(item_index.model, prefixes)
    with Steps("index", 1 + len(others)) as shown:
        for name in [published["factory"], *others]:
            ranker = item_index.model
            searched = item_index if name == published["factory"] else ItemIndex(build_indexes(ranker, name), ranker)
            usual, points = searched.effort, []
            for effort in (1.0,) if searched.exact else EFFORTS:
                searched.spend(effort)
                recall, times = measure(searched, prefixes, worst)
                points.append((float(np.median(times)), recall))
            searched.spend(usual)
            curves[factory_of(name, items)] = points
            shown.advance()
    yield f"<p>The published index is {escape(published['factory'])}. Recall@{CHECK_K} against scoring every item, by the median "
    yield f"milliseconds of a search, over {len(prefixes)} test sessions; the points of a line are searches of increasing effort.</p>"
    yield f'<div class="one">{chart(f"recall@{CHECK_K}", curves, "ms", dots=True)}</div>'


def sessions(recommender: Recommender, images: Drawings) -> Iterator[str]:
    """Yields test sessions with their recommendations."""
    yield f"<p>Left: the last {SEEN} items seen. Right: the first {SHOWN} recommended; the true next item is framed in green.</p>"
    for session in [s for s in recommender.sample_rows() if len(s) > 1][:SESSIONS]:
        *prefix, target = session
        scores = recommender.ranker.scores(recommender.ranker.encode(prefix), np.arange(len(recommender.item_ids)))
        rank = int((scores > scores[target]).sum()) + 1
        seen = "".join(images.boxed(row) for row in prefix[-SEEN:])
        best = "".join(images.boxed(row, row == target) for row in first(scores, min(SHOWN, len(scores))).tolist())
        target_box = "" if rank <= SHOWN else f'<div><span>true next item</span><div class="row">{images.boxed(target)}</div></div>'
        yield f'<div class="session"><div><span>seen</span><div class="row">{seen}</div></div>'
        yield f'<div><span>recommended; the true next item has rank {rank:,}</span><div class="row">{best}</div></div>{target_box}</div>'
