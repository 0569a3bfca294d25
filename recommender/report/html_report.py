"""`tpad report`: one HTML file about a run that needs nothing else to be looked at: no network, no script.

Results with their intervals, what training looked like, the catalogue seen by each half, the index, twenty test sessions
with what was recommended and what came, and the settings. All texts are escaped; the images are small JPEGs, each held
once and shown wherever it is needed.
"""

import base64
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.files import replacing
from pipeline.core.progress import Steps
from pipeline.data.catalog import Catalog, load_catalog
from recommender.metrics.evaluator import REFIT_NOTE
from recommender.metrics.ranks import case_values
from recommender.metrics.results_table import COLUMNS, ROWS
from recommender.metrics.significance import paired_bootstrap
from recommender.report.charts import Curve, chart, plane
from recommender.retrieval.index import FLAT_ITEMS, ItemIndex, build_indexes, factory_of
from recommender.retrieval.index_tuning import CHECK_K, EFFORTS, asked, exact_worst, measure
from recommender.serving.recommender import Recommender
from recommender.serving.thumbnails import small
from recommender.session_model.top_k import first

SESSIONS, SEEN, SHOWN = 20, 5, 10  # test sessions, the last items of each, and the first of its ranking
IMAGES = 300  # on a map
DOTS = 3000
COMPARED_ITEMS = 1000  # of fewer, any index will do
SIDE, QUALITY = 56, 80  # pixels of a picture; of its JPEG
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


class ItemImages:
    """Items as SVG: a picture where there is one, else the beginning of the title. `definitions` holds what they refer to."""

    def __init__(self, catalog: Catalog | None, recommender: Recommender) -> None:
        self.catalog, self.recommender = catalog, recommender
        self.kept: dict[int, str] = {}

    def of(self, row: int) -> str:
        if row not in self.kept:
            self.kept[row] = self._draw(row)
        return f'<use href="#i{row}"/>'

    def _draw(self, row: int) -> str:
        title, place = self.recommender.titles[row], None
        if self.catalog is not None:
            place = self.catalog.row.get(self.recommender.item_ids[row])
        try:
            image = None if self.catalog is None or place is None else self.catalog.image(place)
        except UserError:  # one that cannot be decoded is none
            image = None
        if image is None:
            return f'<rect width="100%" height="100%" fill="#dfe5ec"/><text x="4" y="32">{escape(title[:9])}</text>'
        data = base64.b64encode(small(image, SIDE, QUALITY)).decode()
        return f'<image width="{SIDE}" height="{SIDE}" href="data:image/jpeg;base64,{data}"/>'

    def definitions(self) -> str:
        symbols = (f'<symbol id="i{row}" viewBox="0 0 {SIDE} {SIDE}">{svg}</symbol>' for row, svg in self.kept.items())
        return f'<svg width="0" height="0" aria-hidden="true" style="position:absolute">{"".join(symbols)}</svg>'

    def boxed(self, row: int, hit: bool = False, note: str = "") -> str:
        said = escape(f"{self.recommender.titles[row]} ({self.recommender.item_ids[row]}){note}")
        return f'<svg role="img" aria-label="{said}"{" class=hit" if hit else ""}><title>{said}</title>{self.of(row)}</svg>'


def write_report(run: Path, data: Path | None, config: str) -> Path:
    """`run/report.html`; `config` is the YAML of the settings. Without a data folder there are no images."""
    recommender = Recommender.load(run)
    metrics = json.loads((recommender.version.path / "metrics.json").read_text(encoding="utf-8"))
    catalog = None
    try:
        catalog = None if data is None else load_catalog(data)
    except UserError as error:  # a report needs no images
        print(f"no images: {error}", file=sys.stderr)
    images = ItemImages(catalog, recommender)
    made_of = recommender.version.manifest
    facts = metrics["facts"]
    counts = ", ".join(f"{facts[f'{name}_sessions']:,} {name} sessions" for name in ("train", "valid", "test"))
    parts = [
        f"<h1>{escape(run.resolve().name)}</h1>",
        f'<p class="dim">session model {recommender.version.name}, embeddings {escape(made_of["embeddings_version"] or "none")}; '
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
    path = run / "report.html"
    with replacing(path) as temporary:
        temporary.write_text("\n".join([head, images.definitions(), *parts, "</body></html>\n"]), encoding="utf-8")
    return path


def section(title: str, content: Iterator[str] | Sequence[str]) -> list[str]:
    """Nothing where there is nothing to show."""
    found = [part for part in content if part]
    return [f"<section><h2>{escape(title)}</h2>", *found, "</section>"] if found else []


# --- results


def results(metrics: Mapping[str, Any], ranks: Path) -> Iterator[str]:
    table = pq.read_table(ranks).to_pydict() if ranks.exists() else {"session_id": []}
    number = np.unique(np.array(table["session_id"], dtype=str), return_inverse=True)[1]
    yield "<p>Next item, every position of every test session, all items ranked. In small print: the 95 % interval (bootstrap over "
    yield "test sessions, for the models whose ranks are kept), or the standard deviation over seeds.</p>"
    if metrics["facts"].get("refit"):
        yield f"<p>{escape(REFIT_NOTE.capitalize())}.</p>"
    if told := metrics["facts"].get("calibration", {}).get("told"):
        yield f"<p>{escape(told.capitalize())}.</p>"
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
                found = paired_bootstrap(values, np.zeros(len(values)), number, draws=2000)
                note = f"{found.low:.4f} – {found.high:.4f}"
            cells.append(f"<td>{'–' if value is None else f'{value:.4f}'}{f'<small>{note}</small>' if note else ''}</td>")
        yield f"<tr{' class=ours' if name == 'full' else ''}><td>{escape(name)}</td>{''.join(cells)}</tr>"
    yield "</table></div>"
    if "full" in table:
        for other in (name for name in ("ID-only", "content-only") if name in table):
            ours, theirs = (case_values(np.array(table[name]), "MRR@20") for name in ("full", other))
            found = paired_bootstrap(ours, theirs, number)
            yield f"<p>MRR@20 of full less that of {other}: {found.mean:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}.</p>"


# --- curves


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole; a kill may have cut one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(dict(json.loads(line)))
        except ValueError:
            continue
    return found


def distillation(path: Path) -> Iterator[str]:
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}  # phase -> name -> (step, value)
    for line in read_lines(path):
        curves = phases.setdefault(str(line.pop("phase", "")), {})
        step = line.pop("step", 0)
        for name, value in line.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((step, value))
    for phase, curves in phases.items():
        yield f'<h3>{escape(phase)}</h3><div class="grid">'
        for name in (name for name in curves if not (name.startswith("held_out_") and name.removeprefix("held_out_") in curves)):
            held_out = curves.get(f"held_out_{name}", [])
            yield chart(name.replace("_", " "), {"training": curves[name], "held out": held_out})
        yield "</div>"


def training(path: Path) -> Iterator[str]:
    losses: dict[str, list[tuple[float, float]]] = {}
    for line in read_lines(path):
        name = f"{line.get('model')}, seed {line.get('seed')}"
        losses.setdefault(name, []).append((line.get("step", 0), line.get("loss", np.nan)))
    yield f'<div class="one">{chart("loss", losses)}</div>' if losses else ""


# --- catalogue, index, sessions


def maps(recommender: Recommender, images: ItemImages) -> Iterator[str]:
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
        what = {"knowledge": "knowledge: what items are", "transition": "transition: what people move on to"}[half]
        yield plane(what, centred @ axes[:2].T, {n: images.of(int(rows[n])) for n in chosen})
    yield "</div>"


def index(recommender: Recommender) -> Iterator[str]:
    """The published index, and of a small catalogue the other kinds too, by recall and latency now, on this machine."""
    published = recommender.version.manifest["index"]
    items, own = len(recommender.item_ids), recommender.index
    others = [
        name
        for name in ("flat", "hnsw", "ivf")
        if COMPARED_ITEMS <= items <= FLAT_ITEMS and factory_of(name, items) != published["factory"]
    ]
    curves: dict[str, Curve] = {}
    prefixes = asked(own.ranker, recommender.sample_rows())
    worst = exact_worst(own.ranker, prefixes)
    with Steps("index", 1 + len(others)) as shown:
        for name in [published["factory"], *others]:
            each = own if name == published["factory"] else ItemIndex(build_indexes(own.ranker, name), own.ranker)
            usual, found = each.effort, []
            for effort in (1.0,) if each.exact else EFFORTS:
                each.spend(effort)
                recall, times = measure(each, prefixes, worst)
                found.append((float(np.median(times)), recall))
            each.spend(usual)
            curves[factory_of(name, items)] = found
            shown.advance()
    yield f"<p>The published index is {escape(published['factory'])}. Recall@{CHECK_K} against scoring every item, by the median "
    yield f"milliseconds of a search, over {len(prefixes)} test sessions; the points of a line spend more and more on a search.</p>"
    yield f'<div class="one">{chart(f"recall@{CHECK_K}", curves, "ms", dots=True)}</div>'


def sessions(recommender: Recommender, images: ItemImages) -> Iterator[str]:
    yield f"<p>Left: the last {SEEN} items seen. Right: the first {SHOWN} recommended; the item that came next is framed in green.</p>"
    for session in [s for s in recommender.sample_rows() if len(s) > 1][:SESSIONS]:
        *prefix, target = session
        scores = recommender.ranker.scores(recommender.ranker.read(prefix), np.arange(len(recommender.item_ids)))
        rank = int((scores > scores[target]).sum()) + 1
        seen = "".join(images.boxed(row) for row in prefix[-SEEN:])
        best = "".join(images.boxed(row, row == target) for row in first(scores, min(SHOWN, len(scores))).tolist())
        came = "" if rank <= SHOWN else f'<div><span>came next</span><div class="row">{images.boxed(target)}</div></div>'
        yield f'<div class="session"><div><span>seen</span><div class="row">{seen}</div></div>'
        yield f'<div><span>recommended; what came next has rank {rank:,}</span><div class="row">{best}</div></div>{came}</div>'
