"""Draws charts as inline SVG: lines over steps, and a map of small images. All texts are escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

Curve = Sequence[tuple[float, float]]
COLOURS = ("#2458a6", "#c2571a", "#3d8a4e", "#8a4d9e", "#666666", "#b3902a")
WIDTH, HEIGHT = 320, 150  # of a chart, in SVG units; the page sets its size on the screen
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 20
MOST_POINTS = 160  # of a curve; longer curves are averaged


def number(value: float) -> str:
    """Formats a number for an axis."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def averaged(curve: Curve) -> Curve:
    """Averages a curve to at most `MOST_POINTS` points, each the mean of consecutive points."""
    points = np.array([point for point in curve if np.isfinite(point).all()]).reshape(-1, 2)
    stretches = np.array_split(points, min(len(points), MOST_POINTS)) if len(points) else []
    return [tuple(stretch.mean(0).tolist()) for stretch in stretches]


def chart(title: str, curves: Mapping[str, Curve], x_name: str = "step", dots: bool = False) -> str:
    """Returns a figure with one line for each curve; with `dots`, points are marked and not averaged."""
    shown = {name: list(curve) if dots else averaged(curve) for name, curve in curves.items()}
    shown = {name: curve for name, curve in shown.items() if curve}
    if not shown:
        return ""
    xs, ys = np.array([point for curve in shown.values() for point in curve]).T
    (x_low, x_high), (y_low, y_high) = (padded(values) for values in (xs, ys))
    across, down = (WIDTH - LEFT - RIGHT) / (x_high - x_low), (HEIGHT - TOP - BOTTOM) / (y_high - y_low)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return round(LEFT + (point[0] - x_low) * across, 1), round(HEIGHT - BOTTOM - (point[1] - y_low) * down, 1)

    marks = []
    for colour, curve in zip(COLOURS * len(shown), shown.values(), strict=False):
        places = [place(point) for point in curve]
        line = " ".join(f"{x},{y}" for x, y in places)
        marks.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        marks += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places] if dots or len(places) == 1 else []
    grid = []
    for share in (0.0, 0.5, 1.0):
        y, x = y_low + share * (y_high - y_low), x_low + share * (x_high - x_low)
        px, py = place((x, y))
        x = x if dots else int(x)
        anchor = ("start", "middle", "end")[int(share * 2)]
        grid.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}" stroke="#e3e3e3"/>')
        grid.append(f'<text x="{LEFT - 5}" y="{py + 3.5}" text-anchor="end">{number(y)}</text>')
        unit = f" {escape(x_name)}" if share == 1 else ""
        grid.append(f'<text x="{px}" y="{HEIGHT - 5}" text-anchor="{anchor}">{number(x)}{unit}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(grid + marks)}</svg>'
    return f"<figure><figcaption>{escape(title)}{legend(shown) if len(shown) > 1 else ''}</figcaption>{svg}</figure>"


def padded(values: np.ndarray) -> tuple[float, float]:
    """Returns the range of an axis, which is never empty."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def legend(names: Iterable[str]) -> str:
    """Returns the names of the curves in their colours."""
    keys = zip(COLOURS * 9, names, strict=False)
    return "".join(f' <span class="key" style="color:{colour}">{escape(name)}</span>' for colour, name in keys)


def plane(title: str, points: np.ndarray, labelled: Mapping[int, str], side: int = 600, mark: int = 26) -> str:
    """Returns a map of points (N, 2): the `labelled` ones (row -> SVG) as images in squares of side `mark`, the others as dots."""
    low, high = np.quantile(points, 0.01, axis=0), np.quantile(points, 0.99, axis=0)
    places = np.clip((points - low) / np.maximum(high - low, 1e-9), 0, 1) * (side - mark)
    dots = "".join(f'<circle cx="{x + mark / 2:.0f}" cy="{y + mark / 2:.0f}" r="1.6" fill="#b8c4d6"/>' for x, y in places)
    placed = ((*places[row], svg) for row, svg in labelled.items())
    images = "".join(f'<svg x="{x:.0f}" y="{y:.0f}" width="{mark}" height="{mark}">{svg}</svg>' for x, y, svg in placed)
    svg = f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}">{dots}{images}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
