"""Prints the answer of `tpad recommend` for one session: the session, a table of ranked items, and the figures of the model."""

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from pipeline.core.artifact import decoding
from pipeline.core.errors import printable
from pipeline.core.files import read_json
from pipeline.core.printed_table import print_table

if TYPE_CHECKING:
    from recommender.serving.recommender import Item, Recommender

FIGURES = {"full": "session model", "popularity": "popularity", "ID-only": "ID-only", "ceiling": "ceiling"}


def session_lines(recommender: "Recommender", item_ids: list[str]) -> list[str]:
    """Returns a line with the title of each item of the session."""
    rows = {item_id: recommender.row.get(item_id) for item_id in item_ids}
    titles = {item_id: "not in the catalogue, ignored" if row is None else recommender.titles[row] for item_id, row in rows.items()}
    return [f"  {item_id}  {titles[item_id]}" for item_id in item_ids]


def print_items(recommender: "Recommender", items: "list[Item]") -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("item_id", no_wrap=True)
    for name in ("title", "similar to", "next after"):
        table.add_column(name)
    table.add_column("score", justify="right")
    for item in items:
        reasons = ("" if item_id is None else recommender.titles[recommender.row[item_id]] for item_id in (item.similar_to, item.after))
        table.add_row(str(item.rank), *(escape(printable(text)) for text in (item.item_id, item.title, *reasons)), f"{item.score:.4f}")
    print_table(table)


def figures_line(recommender: "Recommender") -> str:
    """Returns one line of the table that `tpad train-sbr` printed."""
    from recommender.serving.recommender import HINT

    with decoding(recommender.version.path / "metrics.json", HINT):
        metrics = read_json(recommender.version.path / "metrics.json")
        results, held_out = metrics["results"], ", trained without the newest sessions" if metrics["facts"].get("refit") else ""
        figures = [f"{name} {results[key]['mean']['all']['HR@10']:.3f}" for key, name in FIGURES.items() if key in results]
    return f"HR@10 on the test sessions{held_out}: {', '.join(figures)}"
