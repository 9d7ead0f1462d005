"""Line charts as inline SVG: a few kilobytes each, with a text alternative and a title on points, coloured by the page's style."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
POINTS = 60  # of a line; more are averaged in bins
TITLED = 16  # points of a line that say their value
COLOURS = 8  # classes c0 to c7 of style.css; further lines are dashed


@dataclass
class Series:
    """A line of (x, y), with a band where there is one."""

    label: str
    xs: list[float]
    ys: list[float]
    lows: list[float] | None = None
    highs: list[float] | None = None
    colour: int = 0
    thin: bool = False  # an unfinished run


def binned(series: Series) -> Series:
    """At most ``POINTS`` points: means of neighbours."""
    n = len(series.xs)
    if n <= POINTS:
        return series
    edges = [i * n // POINTS for i in range(POINTS + 1)]

    def means(values: list[float] | None) -> list[float] | None:
        if values is None:
            return None
        return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]

    xs, ys = means(series.xs) or [], means(series.ys) or []
    return Series(series.label, xs, ys, means(series.lows), means(series.highs), series.colour, series.thin)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two, with a step of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def said(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.4g}"


def line_chart(title: str, x_label: str, y_label: str, lines: list[Series], ident: str) -> str:
    """SVG of some lines; its description says where each begins, ends, and was highest and lowest."""
    lines = [binned(line) for line in lines if line.xs]
    every = [y for s in lines for y in (*s.ys, *(s.lows or ()), *(s.highs or ()))]
    x0, x1 = min(x for s in lines for x in s.xs), max(x for s in lines for x in s.xs)
    y0, y1 = min(every), max(every)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    room = (y1 - y0) * 0.06 or abs(y1) * 0.05 or 0.5
    y0, y1 = y0 - room, y1 + room

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{ident}-t {ident}-d">',
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(described(lines, x_label))}</desc>',
    ]
    for y in ticks(y0, y1):
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{said(y)}</text>')
    for x in ticks(x0, x1):
        parts.append(
            f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{said(x)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for s in lines:
        if s.lows and s.highs:
            there = [f"{px(x):.1f} {py(y):.1f}" for x, y in zip(s.xs, s.highs, strict=True)]
            back = [f"{px(x):.1f} {py(y):.1f}" for x, y in zip(reversed(s.xs), reversed(s.lows), strict=True)]
            parts.append(f'<path class="band c{s.colour % COLOURS}" d="M{"L".join(there + back)}Z"/>')
    for s in lines:
        kind = f"line c{s.colour % COLOURS}" + (" dash" if s.colour >= COLOURS else "") + (" thin" if s.thin else "")
        points = [f"{px(x):.1f} {py(y):.1f}" for x, y in zip(s.xs, s.ys, strict=True)]
        parts.append(f'<path class="{kind}" d="M{"L".join(points)}"/>')
        shown = (
            {round(i * (len(s.xs) - 1) / (TITLED - 1)) for i in range(TITLED)}
            if len(s.xs) > TITLED
            else range(len(s.xs))
        )
        for i in sorted(shown):
            spread = f" ({said(s.lows[i])} to {said(s.highs[i])})" if s.lows and s.highs else ""
            text = f"{s.label}, {x_label} {said(s.xs[i])}: {said(s.ys[i])}{spread}"
            parts.append(
                f'<circle class="c{s.colour % COLOURS}" cx="{px(s.xs[i]):.1f}" cy="{py(s.ys[i]):.1f}" r="5"><title>{escape(text)}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def described(lines: list[Series], x_label: str) -> str:
    """The lines in words."""
    texts = []
    for s in lines:
        high, low = max(range(len(s.ys)), key=s.ys.__getitem__), min(range(len(s.ys)), key=s.ys.__getitem__)
        texts.append(
            f"{s.label}: {said(s.ys[0])} at {x_label} {said(s.xs[0])}, {said(s.ys[-1])} at {said(s.xs[-1])}; highest "
            f"{said(s.ys[high])} at {said(s.xs[high])}, lowest {said(s.ys[low])} at {said(s.xs[low])}."
        )
    return " ".join(texts)
